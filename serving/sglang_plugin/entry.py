"""The entry point that SGLang calls: hook the choice of a layer's method, and the report of a server's state.

SGLang runs it in each of its processes, and only logs what it raises: a plugin that fails is silent. `SystemExit`
passes through, so what must end the server is raised as one; what a layer finds later is raised where its weights are
made or processed, which ends the scheduler, and the server with it.
"""

import functools
import logging
import os
import pkgutil
import sys

from lightship.errors import ServingError
from lightship.serving.sglang_plugin import activity, takeover
from lightship.serving.sglang_plugin.settings import MOE, Settings

SCHEDULER = "sglang.srt.managers.scheduler"
CHOICE = "sglang.srt.layers.quantization.w4afp8.W4AFp8Config.get_quant_method"
STATE = f"{SCHEDULER}.Scheduler.get_internal_state"
"""Behind `/server_info`; only a scheduler's process has it, and there its module is loaded before the plugins are."""

logger = logging.getLogger(__name__)


def activate() -> None:
    """Hook SGLang as the environment asks.

    Raises:
        SystemExit: an unknown setting, or LIGHTSHIP_MOE=on with an SGLang that has no such targets.
    """
    try:
        settings = Settings.read(os.environ)
        if settings.mode != "off":
            _hook(settings)
    except ServingError as error:
        raise SystemExit(f"lightship: error: {error}") from error


def _hook(settings: Settings) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    targets = [CHOICE] + [STATE] * (SCHEDULER in sys.modules)
    for target in targets:
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            reason = f"this SGLang has no {target}: {error}"
            if settings.mode == "on":
                raise ServingError(f"{MOE}=on, but {reason}; use a version that docs/sglang.md names") from error
            logger.warning("lightship leaves SGLang as it is: %s", reason)
            return
    HookRegistry.register(CHOICE, functools.partial(takeover.choose_method, settings), HookType.AROUND)
    if STATE in targets:
        HookRegistry.register(STATE, activity.add_to_state, HookType.AFTER)
