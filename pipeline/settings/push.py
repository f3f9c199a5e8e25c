"""Settings of `swsc push`."""

from typing import Annotated, ClassVar

from pydantic import Field

from pipeline.settings.validation import Option, Settings


class PushSettings(Settings):
    """How an output is uploaded to a repository of the Hugging Face Hub."""

    groups: ClassVar[tuple[str, ...]] = ("Hugging Face Hub",)
    private: bool = Field(
        False, description="Create the repository as a private one; an existing public repository is refused."
    )
    revision: Annotated[str | None, Option("BRANCH", default="main")] = Field(
        None, min_length=1, description="Branch to push to."
    )
    message: Annotated[str | None, Option("MESSAGE")] = Field(None, min_length=1, description="Commit message.")
