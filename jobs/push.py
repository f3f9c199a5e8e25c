"""`swsc push OUTPUT REPO_ID`: verify an output and upload it to the Hugging Face Hub."""

import argparse

from jobs.command_line.flags import settings_of
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.push import PushSettings
from pipeline.verbs.push import PushRequest, push


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments, PushSettings, ClusterSettings)
    request = PushRequest(arguments.model, arguments.repo, settings[PushSettings], settings[ClusterSettings])
    print(f"{arguments.model}: pushed, {push(request).commit}")
    return 0
