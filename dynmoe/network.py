"""The Hugging Face Hub, asked once whether it is there before anything is downloaded.

Its library tries every request six times with growing waits, for each of the files that a model may
have (huggingface_hub 2.4, utils/_http.py, http_backoff): without a network that is minutes.
"""

from __future__ import annotations

import os
from functools import cache

SECONDS = 5.0  # until a connection counts as missing


@cache
def go_offline_if_unreachable() -> bool:
    """Let the libraries read what they have cached, and nothing else, where no hub answers.

    True where the hub answers. Any answer counts, an error's too; proxies of the environment are
    used as the library uses them.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later: datasets
        return False
    return True
