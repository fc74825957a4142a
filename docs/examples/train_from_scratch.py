"""Train a model on a text from nothing, and let it speak: python train_from_scratch.py TEXT.txt FOLDER."""

import sys

import llamakit as lk


def main(text: str, folder: str) -> None:
    config = lk.TrainConfig(
        train_data=text, out_dir=folder, vocab_size=320, ctx=32, embd=32, layer=2, head=2, batch=4, adam_iter=20,
        adam_alpha=3e-3, warmup=2, sample_tokens=0,
    )  # fmt: skip
    for report in lk.train(config):
        print(report)
    file = lk.open_model(f"{folder}/model-LATEST.gguf")
    model, tokenizer = lk.load_model(file), lk.load_tokenizer(file)
    for token in lk.generate(model, tokenizer, "The", lk.GenerateConfig(n_predict=20, seed=1)):
        print(token.text, end="")
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
