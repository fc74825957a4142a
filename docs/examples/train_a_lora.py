"""Train a LoRA adapter on a GGUF model and use it: python train_a_lora.py MODEL.gguf TEXT.txt."""

import sys

import llamakit as lk


def main(path: str, text: str) -> None:
    config = lk.FinetuneConfig(
        model_base=path, train_data=text, checkpoint_in="", checkpoint_out="", lora_out="style-ITERATION.gguf",
        ctx=32, batch=2, adam_iter=6, warmup=2, save_every=0, seed=1,
    )  # fmt: skip
    for report in lk.finetune(config):
        print(report)
    file = lk.open_model(path)
    model, tokenizer = lk.load_model(file), lk.load_tokenizer(file)
    lk.attach(model, lk.read_adapter("style-LATEST.gguf"))
    for token in lk.generate(model, tokenizer, "Once upon a time", lk.GenerateConfig(n_predict=20, seed=1)):
        print(token.text, end="")
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
