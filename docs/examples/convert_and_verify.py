"""Convert a model, and prove the result before it gets its name: python convert_and_verify.py SOURCE TARGET [TYPE]."""

import sys
from pathlib import Path

from llamakit import ConvertConfig, LlamakitError, ModelFile, convert, verify


def main(source: str, target: str, outtype: str = "auto") -> None:
    def prove(expected: ModelFile, written: ModelFile) -> None:
        report = verify(expected, written)
        print(f"{report.n_equal} of {report.n_tensors} tensors equal, vocabulary {report.vocabulary}")
        print(f"max |dlogit| = {report.max_dlogit}, KL = {report.kl} nats per token")
        if not report.passed:  # what is raised here leaves nothing of the target
            raise LlamakitError("; ".join(report.failures), path=source)

    config = ConvertConfig(source=Path(source), out=Path(target), outtype=outtype)
    written = convert(config, verify=prove)
    print(f"wrote {', '.join(map(str, written.paths))}: {written.n_bytes} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
