"""Continue a prompt with a GGUF model: python prompt_a_gguf.py MODEL.gguf "Once upon a time"."""

import sys

from llamakit import GenerateConfig, generate, load_model, load_tokenizer, open_model


def main(path: str, prompt: str) -> None:
    file = open_model(path)
    tokenizer = load_tokenizer(file)
    model = load_model(file)
    print(prompt, end="")
    for token in generate(model, tokenizer, prompt, GenerateConfig(n_predict=40, temperature=0.0)):
        print(token.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
