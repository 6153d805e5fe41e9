#!/usr/bin/env bash
# Install what tests/reporting/test_browser.py drives a browser with: the versions in package-lock.json.
# Needs node >= 20 and npm; the browser itself is the system's (apt-get install chromium).
set -euo pipefail
cd "$(dirname "$0")"
npm ci --ignore-scripts --no-audit --no-fund
