"""Where a model's files are: in a folder, or under a name on the Hugging Face hub."""

import re
from pathlib import Path

REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Source:
    """The files of a folder, or of a hub name such as "gpt2" that is no folder here.

    options are huggingface_hub's (cache_dir, force_download, local_files_only, revision, token);
    it keeps what it fetches, and honours HF_HUB_OFFLINE and HF_HOME.
    """

    def __init__(self, name_or_path: str | Path, *, subfolder: str = "", **options):
        self.name, self.subfolder, self.options = name_or_path, subfolder, options
        on_hub = isinstance(name_or_path, str) and REPOSITORY.fullmatch(name_or_path)
        self.remote = bool(on_hub) and not Path(name_or_path).is_dir()
        self.trouble = ""
        self.asked = False

    def __str__(self) -> str:
        return str(Path(self.name) / self.subfolder)

    def find(self, name: str) -> Path | None:
        """A path to the file `name`, fetched if need be; None where there is none."""
        if not self.remote:
            path = Path(self.name) / self.subfolder / name
            return path if path.is_file() else None
        self._reach()
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

        folder = self.subfolder or None
        try:
            return Path(hf_hub_download(str(self.name), name, subfolder=folder, **self.options))
        except EntryNotFoundError as error:  # also: no network, and not fetched before
            self.trouble = self.trouble or _first_line(error)
        except HfHubHTTPError as error:
            raise FileNotFoundError(f"{self}/{name}: {_first_line(error)}") from error
        return None

    def _reach(self) -> None:
        """Asks the hub whether it is there; if not, only what was fetched before is looked for.

        huggingface_hub would try six times, half a minute, for each file.
        """
        if self.asked or self.options.get("local_files_only"):
            return
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        self.asked = True
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:  # of requests or of httpx, as huggingface_hub's version has it
            self.trouble = f"{constants.ENDPOINT} cannot be reached: {_first_line(error)}"
            self.options["local_files_only"] = not self.options.get("force_download")

    def require(self, *names: str) -> Path:
        """The first of those files that there is; FileNotFoundError where there is none."""
        for name in names:
            path = self.find(name)
            if path is not None:
                return path
        raise FileNotFoundError(
            f"{self}/{names[0]}: no such file; accepted is a folder that holds {' or '.join(names)}"
            f", or the name of a model on the hub {self.trouble and f'({self.trouble})'}".rstrip()
        )

    def folder(self, *names: str) -> Path:
        """A folder that holds those of the files that there are; FileNotFoundError without any."""
        if not self.remote:
            return Path(self.name) / self.subfolder
        found = [path for path in map(self.find, names) if path is not None]
        if not found:
            raise FileNotFoundError(
                f"{self}: no such folder, and none of {', '.join(names)} under that name on the "
                f"hub ({self.trouble})"
            )
        return found[0].parent


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
