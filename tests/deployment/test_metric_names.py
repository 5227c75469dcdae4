"""What the dashboard and the autoscaler ask for is what the server exports."""

import json
import re

import pytest
from prometheus_client import CollectorRegistry

from support.deployment import DASHBOARD, KUBERNETES, documents

METRIC = re.compile(r"mili:\w+")
