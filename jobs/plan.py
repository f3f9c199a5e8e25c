"""`swsc plan MODEL`: show what compress would do to each tensor, and its estimated cost."""

import argparse

from jobs.command_line.flags import settings_of
from jobs.command_line.results import print_plan
from pipeline.settings.calibration import CalibrationSettings
from pipeline.settings.cluster import ClusterSettings
from pipeline.settings.compression import CompressSettings, OutputSettings
from pipeline.verbs.plan import PlanRequest, plan


def run(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments, CompressSettings, CalibrationSettings, ClusterSettings, OutputSettings)
    request = PlanRequest(
        arguments.model,
        settings[CompressSettings],
        settings[CalibrationSettings],
        settings[ClusterSettings],
        settings[OutputSettings],
        output=arguments.output,
        json=arguments.json,
        config=arguments.config,
    )
    result = plan(request)
    print_plan(result)
    result.require_acceptable()
    return 0
