"""What docs/leaving-torchscript.md says of the models is what docs/exports.md shows of them."""

from __future__ import annotations

import re

from tests.support.projects import REPOSITORY


def test_the_counts_of_models_are_those_of_the_page_on_exports() -> None:
    said = (REPOSITORY / "docs" / "leaving-torchscript.md").read_text().replace("\n", " ")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        # The first of its tables.
        for line in (REPOSITORY / "docs" / "exports.md").read_text().partition("\n## ")[0].splitlines()
        if line.startswith("| ")
    ]
    names, models = rows[0], rows[1:]
    taken = {name: sum(row[names.index(name)] in ("exact", "within") for row in models) for name in names[1:4]}
    assert len(models) == 15
    found = re.search(r"TorchScript takes (\d+), `pt2` (\d+) and `onnx` (\d+)", said)
    assert found is not None
    assert [int(number) for number in found.groups()] == [taken["torchscript"], taken["pt2"], taken["onnx"]]
    alone = [row[0] for row in models if row[names.index("torchscript")] != "refused" and row[2:4] == ["refused"] * 2]
    assert "The four that only TorchScript takes all decide on data" in said and len(alone) == 4, alone
