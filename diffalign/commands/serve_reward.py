"""Serve a reward over HTTP, for trainers that cannot run it because of its packages or its device."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .options import positive

_VARIABLE = "DIFFALIGN_REWARD_TOKEN"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reward", type=Path, metavar="REWARD.yaml", help="a reward as in a run file: class_path and init_args")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on; 0 takes any free port (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: only this machine)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=f"file with the clients' bearer token; else ${_VARIABLE}, if set")
    parser.add_argument("--without-token", action="store_true", help="answer every client that reaches the address")
    parser.add_argument("--device", help="device of the images (cuda if there is one)")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="images that the reward sees at once (%(default)s)")
    parser.add_argument("--queue", type=positive, default=128, metavar="N", help="requests that are handled at a time (%(default)s)")
    parser.add_argument("--max-images", type=positive, default=64, metavar="N", help="images of one request (%(default)s)")
    parser.add_argument("--max-megabytes", type=positive, default=64, metavar="N", help="size of the body of one request (%(default)s)")
    parser.add_argument("--max-megapixels", type=positive, default=33, metavar="N", help="all images of one request (%(default)s)")
    parser.epilog = (
        "Arguments of the reward can be replaced after REWARD.yaml by their dotted path: --quality 50; "
        "--init_args.batch 8 if an option above has the same name"
    )


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..config.reward_file import read_reward
    from ..core import ConfigError

    try:
        from .. import serving
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve-reward: {error}") from error
    from ..rewards.wire import Limits
    from ..serving.launch import is_loopback

    token = _token(options)
    if token is None and not options.without_token and not is_loopback(options.host):
        raise ConfigError(
            f"--host {options.host} can be reached from other machines, so clients must have a token: give --token-file or ${_VARIABLE}; "
            "or --without-token, to answer every client"
        )
    limits = Limits(options.max_megabytes * 2**20, options.max_images, options.max_megapixels * 10**6)
    memory = max(2**30, 2 * (4 * limits.body + 3 * limits.pixels))
    try:
        settings = serving.Settings(options.batch, options.queue, memory, limits, device=options.device, token=token)
    except ValueError as error:
        raise ConfigError(f"serve-reward: {error}") from error
    reward, name = read_reward(options.reward, overrides)
    app = serving.application(reward, name, settings)
    serving.serve(app, options.host, options.port, lambda address: print(f"serving {name} at {address}", flush=True))
    return 0


def _token(options: argparse.Namespace) -> str | None:
    from ..core import ConfigError

    if options.without_token:
        if options.token_file is not None:
            raise ConfigError("--token-file and --without-token exclude each other")
        return None
    if options.token_file is None:
        return os.environ.get(_VARIABLE, "").strip() or None
    try:
        token: str = options.token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file must be a readable file with a token: {error}") from error
    if not token:
        raise ConfigError(f"--token-file {options.token_file} must hold a token; it is empty")
    return token
