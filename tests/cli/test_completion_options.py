from llamakit.cli.completion_options import texts


def test_texts_of_an_option_are_escaped_unless_told_otherwise():
    assert texts(None, escape=True) == ()
    assert texts([r"a\nb", ""], escape=True) == ("a\nb", "")
    assert texts([r"a\nb"], escape=False) == (r"a\nb",)
