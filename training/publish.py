"""Upload a repository that `training/export.py` wrote to the Hugging Face Hub.

    python training/publish.py exports/vit_pico_patch8_pmae.mae_imagenette --dry-run    # what would be sent where
    python training/publish.py exports/vit_pico_patch8_pmae.mae_imagenette --private
    python training/publish.py FOLDER --pull-request

`hf auth login` or HF_TOKEN says who you are; HF_ENDPOINT names another Hub. It goes to the repository that
`training/export.py --repo` wrote the card for; a tag of this package is then pinned by the line that is printed, in
`perceptual_mae_models/hub.py`.
"""

from pathlib import Path
from typing import Annotated, Any

import tyro
from huggingface_hub import CommitInfo, HfApi

from perceptual_mae_models.hub import (
    HUB_ORGANISATION,
    MANIFEST,
    WEIGHTS,
    IntegrityError,
    check_file,
    read_manifest,
    sha256_of,
)


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    repo: str | None = None,
    private: bool = False,
    revision: str = "main",
    pull_request: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload every file of the folder's manifest, after checking them against it.

    Args:
        folder: What training/export.py wrote.
        repo: ORGANISATION/NAME: where the folder was written for, which its card names.
        private: Create the repository so that only its organisation sees it. An existing one stays as it is.
        revision: Branch to upload to; it is created where it is missing.
        pull_request: Open a pull request against the branch instead.
        message: Of the commit.
        dry_run: Show what would be sent, and send nothing.
    """
    try:
        manifest = check_repository(folder)
        target = find_target(folder, manifest, repo)
        api = HfApi()
        print(f"{target}, branch {revision}, on {api.endpoint}")
        for name, entry in sorted(manifest["files"].items()):
            print(f"{entry['bytes']:>13,}  {entry['sha256'][:12]}  {name}")
        print(f"{(folder / MANIFEST).stat().st_size:>13,}  {sha256_of(folder / MANIFEST)[:12]}  {MANIFEST}")
        if dry_run:
            print("nothing was sent")
            return
        commit = upload(api, folder, manifest, target, private, revision, pull_request, message)
    except (OSError, ValueError, IntegrityError) as error:
        raise SystemExit(f"publish.py: {error}") from error
    print(commit.pr_url or commit.commit_url)
    if target != f"{HUB_ORGANISATION}/{manifest['name']}":
        print(f'It loads by timm.create_model("hf-hub:{target}", pretrained=True)')
        return
    print("Pin it in PUBLISHED of perceptual_mae_models/hub.py, and take the tag's NOT_PUBLISHED note away:")
    print(f'    "{manifest["name"]}": Publication("{commit.oid}", "{sha256_of(folder / MANIFEST)}"),')


def check_repository(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and compare all files with it.

    Raises:
        FileNotFoundError: If there is no manifest, or a file of it is missing.
        IntegrityError: If a file is not the one in the manifest, or the encoder is not in it.
    """
    manifest = read_manifest(folder / MANIFEST)
    if WEIGHTS not in manifest["files"]:
        raise IntegrityError(f"{folder} holds no weights: nothing to publish")
    for name in manifest["files"]:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: write the folder with training/export.py")
        check_file(folder / name, name, manifest, str(folder))
    return manifest


def find_target(folder: Path, manifest: dict[str, Any], repo: str | None) -> str:
    """The repository that a folder's card tells people to load.

    Raises:
        ValueError: If it is not the one asked for.
    """
    target = manifest.get("repository")
    if not target or repo not in (None, target):
        raise ValueError(
            f"the card in {folder} was written for {target or 'no repository'}"
            f"{f', not for {repo}' if repo else ''}: write the folder again with training/export.py … --repo"
        )
    return str(target)


def upload(
    api: HfApi,
    folder: Path,
    manifest: dict[str, Any],
    target: str,
    private: bool,
    revision: str,
    pull_request: bool,
    message: str | None,
) -> CommitInfo:
    """Create the repository and branch where they are missing and send all files in one commit.

    Raises:
        OSError: If the Hub refuses or does not answer.
    """
    api.create_repo(target, private=private, exist_ok=True)
    if revision != "main" and not pull_request:
        api.create_branch(target, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=target,
        folder_path=folder,
        allow_patterns=[*manifest["files"], MANIFEST],
        revision=revision,
        create_pr=pull_request,
        commit_message=message or f"Upload {manifest['name']}",
    )


if __name__ == "__main__":
    tyro.cli(main)
