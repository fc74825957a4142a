"""Read one tensor of a GGUF model, packed and decoded: python read_a_tensor.py MODEL.gguf NAME."""

import sys

import torch

from llamakit import dequantize, open_model


def main(path: str, name: str = "blk.0.attn_q.weight") -> None:
    file = open_model(path)
    info = file.tensors[name]
    print(f"{info.name}: {info.shape}, {info.type.name}, {info.n_bytes} bytes")
    packed = torch.from_numpy(file.read(name, 0, 4))  # the first four rows alone are read from the disk
    rows = dequantize(packed, info.type, torch.float32)
    print(f"four rows {tuple(rows.shape)}, mean {rows.mean():.6f}, deviation {rows.std():.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
