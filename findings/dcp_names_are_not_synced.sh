#!/usr/bin/env bash
# torch 2.13.0: torch.distributed.checkpoint writes with sync_files=True ("force files to be synced to permanent storage";
# without it "there's no guarantee that the checkpoint will be consistent in the case of a failure"). It syncs the content
# of each file, and never a folder: neither that of the checkpoint, in which .metadata has just been renamed from
# .metadata.tmp, nor the one above, in which the checkpoint's own name is new. fsync(2) says that the content of a file is
# on the disk then, and that its name is only after an fsync of its folder. So a checkpoint for which save() has returned
# may be gone after a power cut, or lack .metadata, while deleting the one before it, done afterwards, may have reached the
# disk. What is safe: fsync the checkpoint's folder and the folder above it before an older checkpoint is deleted.
# seen: 2026-11-30: synced files: .metadata.tmp, __0_0.distcp; synced folders: none
# seen: 2026-11-30: renamed after it was synced: .metadata.tmp to .metadata
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5
"$folder/venv/bin/python" - "$folder/checkpoint" <<'PYTHON'
import os
import stat
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

checkpoint = Path(sys.argv[1])
synced, renamed, real_fsync, real_rename = [], [], os.fsync, Path.rename


def fsync(descriptor):
    file = descriptor if isinstance(descriptor, int) else descriptor.fileno()
    kind = "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
    synced.append((kind, Path(os.readlink(f"/proc/self/fd/{file}")).name))
    return real_fsync(descriptor)


def rename(self, target):
    renamed.append((self.name, Path(target).name, len(synced)))
    return real_rename(self, target)


os.fsync, Path.rename = fsync, rename
dcp.save({"weights": torch.zeros(4)}, checkpoint_id=checkpoint, no_dist=True)
files = sorted(name for kind, name in synced if kind == "file")
folders = sorted(name for kind, name in synced if kind == "folder")
print("synced files:", ", ".join(files), "; synced folders:", ", ".join(folders) or "none")
for old, new, after in renamed:
    print(f"renamed after it was synced: {old} to {new}")
assert files == [".metadata.tmp", "__0_0.distcp"] and not folders, "folders are synced now"
assert [(old, new, after) for old, new, after in renamed] == [(".metadata.tmp", ".metadata", len(synced))]
PYTHON
