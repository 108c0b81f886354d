"""`python -m tests.scenarios`: write anew what comes of every scenario. Then read the difference: `git diff`."""

from __future__ import annotations

import logging

from tests.scenarios.script import rewrite
from tests.scenarios.worlds import FOLDER, scenarios, world_of

logging.disable()
for path in scenarios():
    if rewrite(path, world_of(path)):
        print(path.relative_to(FOLDER))
