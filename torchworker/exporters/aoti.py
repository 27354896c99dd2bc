"""AOTInductor: the exported program compiled for this kind of processor, for machines without Python.

Its own check of inputs takes torch's compile-time assumptions for limits (a convolution says `batch < 16`), and without
it a wrong dtype or size is read as if it were right. So the package carries the signature, which readers check.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from torchworker.exporters.agreement import disagreement, hides_nan
from torchworker.exporters.operators import notes
from torchworker.exporters.program import capture
from torchworker.exporters.subject import Made, Subject
from torchworker.process.failure import UserError, describe
from torchworker.runtimes.load import SIGNATURE, load_artifact


def aoti(subject: Subject, path: Path) -> Made:
    """Compile, write one package and say how.

    Raises UserError without a C++ compiler, and for what cannot be compiled.
    """
    named = compiler()
    captured = capture(subject)
    noted = notes(captured.program, "aoti", subject.folder)
    refusals = []
    for freezing in (True, False):
        with captured.assuming():
            try:
                compiled(captured.program, subject, path, freezing=freezing)
            except Exception as error:
                refusals.append(f"it cannot be compiled: {describe(error).splitlines()[0][:300]}")
                continue
        call = load_artifact("aoti", path, torch.get_num_threads())
        differs = disagreement(call, subject) or (hides_nan(call, subject) if freezing else "")
        if not differs:
            return Made(f"{captured.method} → AOTInductor{', weights folded in' if freezing else ''}, {named}", noted)
        refusals.append(differs)
    path.unlink(missing_ok=True)
    raise UserError(f"export: AOTInductor: {refusals[-1]}; leave aoti out of export.formats")


def compiled(program: ExportedProgram, subject: Subject, path: Path, *, freezing: bool) -> None:
    """Write one package.

    Args:
        program: captured from the subject.
        subject: whose signature the package carries.
        path: of the package.
        freezing: fold the weights in.
    """
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(path),
        inductor_configs={
            "freezing": freezing,
            # The other formats are made beside this one.
            "compile_threads": 1,
            "aot_inductor.metadata": {SIGNATURE: subject.signature()},
        },
    )


def compiler() -> str:
    """Name of the C++ compiler. Raises UserError without one."""
    from torch._inductor import cpp_builder

    try:
        return Path(cpp_builder.get_cpp_compiler()).name
    except Exception as error:
        raise UserError(
            "export: AOTInductor needs a C++ compiler and this machine has none; install g++, name one in the variable "
            "CXX, or leave aoti out of export.formats"
        ) from error
