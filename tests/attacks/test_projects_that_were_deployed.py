"""Whoever may write to the bucket puts a project there that is another, or that reaches out of its folder."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.projects import write_project
from tests.support.repositories import repository
from tests.support.signing_keys import key_pair
from train_and_ship.infra import project_archive
from train_and_ship.infra.errors import JobError
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.project_archive import unpack
from train_and_ship.infra.provenance import git_commit
from train_and_ship.registry.bucket import projects
from train_and_ship.registry.bucket.projects import ARCHIVE, Reference, bring_project, broken_projects, publish_project
from train_and_ship.registry.job.load import load_job
from train_and_ship.ship.packing import pack_project

ABOUT = json.dumps({"model": "plain", "job": "job.yaml", "commit": "none", "place": {}, "python": "", "format": 1})


def member(name: str, text: str = "", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    found.size = len(text)
    for field, value in fields.items():
        setattr(found, field, value)
    return found, text.encode()


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """An archive with a sound project and more."""
    with tarfile.open(path, "w:gz") as archive:
        for one, content in (member("project.json", ABOUT), member("tree/job.yaml", "name: x\n"), *members):
            archive.addfile(one, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "attack",
    [
        member("tree/../../outside.py", "x"),
        member("/outside.py", "x"),
        member("outside.py", "x"),
        member("COMPLETE", ""),
        member("tree/link", type=tarfile.SYMTYPE, linkname="/etc/hosts"),
        member("tree/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        member("tree/hard", type=tarfile.LNKTYPE, linkname="tree/job.yaml"),
        member("tree/pipe", type=tarfile.FIFOTYPE),
        member("tree/device", type=tarfile.CHRTYPE),
        member("tree/job.yaml", "name: y\n"),
        member("lock.txt", type=tarfile.SYMTYPE, linkname="tree/job.yaml"),
    ],
    ids=lambda one: f"{one[0].name}-{one[0].type.decode()}",
)
def test_an_archive_with_something_else_than_files_of_its_own_is_refused(
    tmp_path: Path, attack: tuple[tarfile.TarInfo, bytes]
) -> None:
    place = tmp_path / "place/here"
    place.mkdir(parents=True)
    with pytest.raises(JobError):
        unpack(packed(tmp_path / "project.tar.gz", attack), place)
    assert not (tmp_path / "place/outside.py").exists() and not (tmp_path / "outside.py").exists()


def test_links_that_lead_out_through_each_other_are_refused_in_either_order(tmp_path: Path) -> None:
    links = [
        member("tree/way", type=tarfile.SYMTYPE, linkname="a/b/up/../../beside"),
        member("tree/a/b/up", type=tarfile.SYMTYPE, linkname="../.."),
    ]
    for number, order in enumerate((links, links[::-1])):
        place = tmp_path / f"place-{number}"
        place.mkdir()
        with pytest.raises(JobError):
            unpack(packed(tmp_path / "project.tar.gz", *order), place)


def test_a_file_behind_a_link_is_refused_although_the_link_stays_inside(tmp_path: Path) -> None:
    behind = [member("tree/real/file", "x"), member("tree/way", type=tarfile.SYMTYPE, linkname="real")]
    unpack(packed(tmp_path / "sound.tar.gz", *behind), tmp_path)
    (tmp_path / "place").mkdir()
    with pytest.raises(JobError, match="behind a link"):
        unpack(packed(tmp_path / "project.tar.gz", *behind, member("tree/way/more", "x")), tmp_path / "place")


def test_an_archive_that_grows_beyond_its_limit_is_refused_before_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project_archive, "MOST_BYTES", 1000)
    large = [member(f"tree/{number}", "0" * 400) for number in range(5)]
    with pytest.raises(JobError, match="expected at most"):
        unpack(packed(tmp_path / "project.tar.gz", *large), tmp_path)
    assert not (tmp_path / "tree/3").exists()


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    job_file = write_project(tmp_path / "shop")
    repository(job_file.parent)
    job, folder = load_job(job_file)
    return pack_project(job, job_file, folder).archive


def test_a_project_is_brought_once_and_is_the_one_that_was_deployed(
    object_store: ObjectStore, archive: bytes, tmp_path: Path
) -> None:
    reference = publish_project(object_store, "plain", "job.yaml", archive, None)
    assert publish_project(object_store, "plain", "job.yaml", archive, None) == reference
    assert Reference.parse(str(reference)) == reference
    job = bring_project(object_store, reference, tmp_path / "home", None)
    assert load_job(job)[0].name == "plain"
    object_store.delete(reference.key)
    assert bring_project(object_store, reference, tmp_path / "home", None) == job
    with pytest.raises(JobError, match="found none; `ship deploy` again"):
        bring_project(object_store, reference, tmp_path / "another", None)


def test_a_project_that_was_changed_in_the_bucket_is_refused(
    object_store: ObjectStore, archive: bytes, tmp_path: Path
) -> None:
    reference = publish_project(object_store, "plain", "job.yaml", archive, None)
    object_store.put(reference.key, packed(tmp_path / "other.tar.gz").read_bytes())
    with pytest.raises(JobError, match="it was changed"):
        bring_project(object_store, reference, tmp_path / "home", None)
    assert list((tmp_path / "home/projects").iterdir()) == []
    object_store.delete(reference.key)


def test_with_a_public_key_only_what_that_key_has_signed_is_run(
    object_store: ObjectStore, archive: bytes, tmp_path: Path
) -> None:
    ours, theirs = key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")
    public, home = ours.with_suffix(".pub"), tmp_path / "home"
    unsigned = publish_project(object_store, "plain", "job.yaml", archive, None)
    for key in (None, theirs):
        publish_project(object_store, "plain", "job.yaml", archive, key)
        with pytest.raises(JobError, match=r"expected a signature by key .*`ship deploy` with SHIP_SIGNING_KEY signs"):
            bring_project(object_store, unsigned, home, public)
    # Unpacked already, it still has to be signed.
    bring_project(object_store, unsigned, home, None)
    with pytest.raises(JobError, match="expected a signature"):
        bring_project(object_store, unsigned, home, public)
    signed = publish_project(object_store, "plain", "job.yaml", archive, ours)
    assert bring_project(object_store, signed, home, public).is_file()
    # What lies under the name of a signature and is none keeps nobody from signing.
    for name in object_store.list_keys(f"models/plain/projects/{signed.sha256}/"):
        if name.endswith(".json"):
            object_store.put(name, b"{}")
    publish_project(object_store, "plain", "job.yaml", archive, ours)
    assert bring_project(object_store, signed, home, public).is_file()
    # The same signature is of this model's project and of no other's.
    copied = replace(signed, model="other")
    for name in object_store.list_keys(f"models/plain/projects/{signed.sha256}/"):
        found = object_store.get(name, 10**7)
        assert found is not None
        object_store.put(name.replace("models/plain/", "models/other/"), found[0])
    with pytest.raises(JobError):
        bring_project(object_store, copied, tmp_path / "another", public)


@pytest.mark.parametrize("damage", ["[" * 50_000, "{}", "[]", "", None, ABOUT.replace('"none"', "7"), "\0"])
def test_a_project_that_was_damaged_where_it_was_unpacked_is_unpacked_again(
    object_store: ObjectStore, archive: bytes, tmp_path: Path, damage: str | None
) -> None:
    reference = publish_project(object_store, "plain", "job.yaml", archive, None)
    job = bring_project(object_store, reference, tmp_path / "home", None)
    about = job.parents[1] / "project.json"
    sound = about.read_bytes()
    about.unlink() if damage is None else about.write_text(damage)
    # Before it is brought again: where it came from, of whatever lies in it.
    with pytest.raises(JobError, match=r"delete the folder|expected format 1"):
        git_commit(job.parent)
    assert bring_project(object_store, reference, tmp_path / "home", None) == job
    assert about.read_bytes() == sound and load_job(job)[0].name == "plain"
    job.unlink()
    assert bring_project(object_store, reference, tmp_path / "home", None).is_file()
    assert [place.name for place in (tmp_path / "home/projects").iterdir()] == [reference.sha256]


def test_an_archive_that_says_nothing_of_itself_that_anybody_understands_is_refused(tmp_path: Path) -> None:
    for number, said in enumerate(("[" * 50_000, "[]", ABOUT.replace("{}", "[]"), ABOUT.replace('""', '"3.11"'))):
        place = tmp_path / str(number)
        place.mkdir()
        with tarfile.open(tmp_path / "project.tar.gz", "w:gz") as written:
            for one, content in (member("project.json", said), member("tree/job.yaml", "name: x\n")):
                written.addfile(one, io.BytesIO(content))
        with pytest.raises(JobError, match=r"as `ship deploy` packs it|expected lock"):
            unpack(tmp_path / "project.tar.gz", place)


def test_what_a_trainer_puts_in_place_of_a_project_is_told_and_its_owner_deploys_over_it(
    object_store: ObjectStore, archive: bytes, tmp_path: Path
) -> None:
    ours = key_pair(tmp_path, "ours")
    public, home = ours.with_suffix(".pub"), tmp_path / "home"
    reference = publish_project(object_store, "plain", "job.yaml", archive, ours)
    (signature,) = set(object_store.list_keys("models/plain/projects/")) - {reference.key}
    wrong = {"sha256": "0" * 64}
    for key in (signature, reference.key):
        for body, told in ((b"x" * 300_000, {}), (b"{}", wrong), (b"{}", {f"m{at}": "x" * 20 for at in range(120)})):
            object_store._client.put_object(Bucket=object_store.bucket, Key=key, Body=body, Metadata=told)
            (said,) = broken_projects(object_store, "plain", public)
            assert key in said and "`ship deploy`" in said
            with pytest.raises(JobError):
                bring_project(object_store, reference, home, public)
            publish_project(object_store, "plain", "job.yaml", archive, ours)
            assert list(broken_projects(object_store, "plain", public)) == []
            assert bring_project(object_store, reference, home, public).is_file()
            shutil.rmtree(home)


def test_the_doctor_tells_without_a_key_what_is_no_signature_and_what_is_none_of_ours(
    object_store: ObjectStore, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = publish_project(object_store, "plain", "job.yaml", archive, key_pair(tmp_path, "ours"))
    (signature,) = set(object_store.list_keys("models/plain/projects/")) - {reference.key}
    assert list(broken_projects(object_store, "plain", None)) == []
    deep = b"[" * 5_000
    for junk in (b"", deep, b"\xff", b'{"verificationMaterial": {"publicKey": {"hint": 7}}}'):
        object_store.put(signature, junk)
        (said,) = broken_projects(object_store, "plain", None)
        assert said.startswith("plain: signatures of deployed projects that are none: 1, first")
    object_store.delete(signature)
    for stray in ("projects/x", f"projects/{reference.sha256}/more", f"projects/{reference.sha256[1:]}/{ARCHIVE}"):
        object_store.put(f"models/plain/{stray}", b"x")
    (said,) = broken_projects(object_store, "plain", None)
    assert said.startswith("plain: objects among deployed projects that train-and-ship does not write: 3, first")
    for stray in object_store.list_keys("models/plain/projects/"):
        object_store.delete(stray)
    for job in ("a", "b"):
        publish_project(object_store, "plain", job, job.encode() * 60, None)
    monkeypatch.setattr(projects, "MOST_BYTES", 100)
    (said,) = broken_projects(object_store, "plain", None)
    assert said.startswith("plain: 1 deployed projects were not read back")


@pytest.mark.parametrize(
    "text", ["project:", "project:plain/00/job.yaml", f"project:../x/{'0' * 64}/j.yaml", "project:x"]
)
def test_a_deployment_names_a_project_in_one_way(text: str) -> None:
    with pytest.raises(JobError, match="as `ship deploy` writes it"):
        Reference.parse(text)
    assert Reference.parse("jobs/project.yaml") is None


def test_a_deployment_cannot_name_another_job_file_of_a_project(
    object_store: ObjectStore, archive: bytes, tmp_path: Path
) -> None:
    reference = publish_project(object_store, "plain", "job.yaml", archive, None)
    for job in ("plain.py", "../../../etc/hosts"):
        with pytest.raises(JobError, match=r"expected job\.yaml of model plain"):
            bring_project(object_store, replace(reference, job=job), tmp_path / "home", None)
