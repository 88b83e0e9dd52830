"""Pushing a finished export to the Hub, on request: one commit, after everything is written.

The policy's plain form (`merged/`, else `adapter/`) is the repository itself, loaded by its name;
the other forms lie in it in folders of theirs. Whether and where to push is no part of the stage's
key: another `rlhf export` reuses the finished folders and pushes them again.

The token comes from where huggingface_hub has it: `HF_TOKEN`, or `hf auth login`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.errors import PipelineError
from pipeline.runfolder import RunFolder, read_json
from stages.export.card import on_hub
from stages.export.config import ExportSection

_FIRST = ("merged", "adapter")


def push(run: RunFolder, section: ExportSection, console: Console) -> None:
    """Commit a run's finished export to `section.push_to_hub`.

    Raises:
        PipelineError: the Hub cannot be reached or refuses; the export here stays as it is.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    folder, repository = run.stage("export").artifact, section.push_to_hub
    assert repository is not None
    forms: list[str] = read_json(folder / "export.json")["forms"]
    api = HfApi(library_name="rlhf-pipeline")
    try:
        api.create_repo(repository, private=section.hub_private, exist_ok=True)
        if section.hub_revision is not None:
            api.create_branch(repository, branch=section.hub_revision, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations=list(_files(folder, forms, repository, section.hub_revision)),
            commit_message=f"Export of rlhf-pipeline: {', '.join(forms)}",
            revision=section.hub_revision,
        )
    except OfflineModeIsEnabled as error:
        raise _fault(repository, folder, "HF_HUB_OFFLINE is set: unset it") from error
    except LocalTokenNotFoundError as error:
        raise _fault(repository, folder, _LOGIN) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = f" ({_LOGIN})" if status in (401, 403) else ""
        said = str(error).strip().splitlines()[0]
        raise _fault(repository, folder, f"the Hub answers {status}: {said}{advice}") from error
    except (HTTPError, OSError) as error:
        raise _fault(repository, folder, f"{type(error).__name__}: {error}") from error
    console.print(f"[green]✓[/] pushed to {commit.commit_url}", highlight=False)


_LOGIN = "run `hf auth login` or set HF_TOKEN to a token that may write there"


def _files(folder: Path, forms: list[str], repository: str, revision: str | None) -> Iterator[Any]:
    """What the commit adds, card by card and file by file."""
    from huggingface_hub import CommitOperationAdd

    root = next((form for form in _FIRST if form in forms), forms[0])
    for form in forms:
        inside = "" if form == root else f"{form}/"
        for path in sorted(path for path in (folder / form).rglob("*") if path.is_file()):
            name = path.relative_to(folder / form).as_posix()
            content: str | bytes = str(path)
            if name == "README.md":
                card = path.read_text(encoding="utf-8")
                content = on_hub(card, repository, root, revision).encode("utf-8")
            yield CommitOperationAdd(path_in_repo=inside + name, path_or_fileobj=content)


def _fault(repository: str, folder: Path, reason: str) -> PipelineError:
    return PipelineError(
        f"export.push_to_hub: nothing was pushed to {repository}: {reason}. The export in {folder} "
        "is finished; `rlhf export` again only pushes it"
    )
