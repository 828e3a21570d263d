"""Print `N passed, M failed, K skipped` over pytest's XML reports: python count_tests.py FAILED_STAGES REPORT...

A stage that failed without a failing test (lint, types, a crash) counts as one failure.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> None:
    failed_stages = int(sys.argv[1])
    tests = failures = skipped = 0
    for report in map(Path, sys.argv[2:]):
        if not report.exists():
            continue
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            tests += int(suite.get("tests", 0))
            failures += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
    passed = tests - failures - skipped
    print(f"{passed} passed, {max(failures, failed_stages)} failed, {skipped} skipped")


main()
