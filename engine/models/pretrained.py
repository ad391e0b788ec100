"""Reading folders of pretrained models: a wrong one becomes one line that names it."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin
from huggingface_hub import constants, get_session, snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..basics.errors import CdpoError, OutsideError, told_by
from ..basics.files import LFS_REMEDY, is_lfs_pointer
from ..basics.shipped import locate
from ..recipe import Model

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# That a hub may take to answer; HF_HUB_ETAG_TIMEOUT, its client's own knob for slow networks, comes
# before it.
SECONDS_TO_ANSWER = 2.0


@contextmanager
def reading(what: str, kind: str, path: str | None = None) -> Iterator[str]:
    """The place to read ``path`` from: itself, or what is shipped under that name; all that loads
    from a folder or hub does so in such a block.

    Raise OutsideError, "``what`` is no ``kind``: reason", for whatever a library makes of it, and
    of kind `unreachable` where the hub was to be asked and there is no network. Over
    damaged files that may be anything: tokenizers raises plain Exception, torch.load
    AssertionError, and a processor that needs a package ImportError. What is to come from a hub
    that cannot be reached comes from its cache, without the libraries' retries.
    """
    subject = what if path is None or path in what else f"{what}: {path}"
    if "://" in (path or what):
        raise OutsideError(
            f"{subject} is a URL, and no {kind} is read from one over the network: give a hub id "
            "where one will do, or download it and name the folder or file",
            what.partition("=")[0] if "=" in what else path,
            "unsupported",
        )
    place = locate(path or "")
    is_remote = HUB_ID.fullmatch(place) and not os.path.exists(place)
    offline = why_offline(constants.ENDPOINT) if is_remote else None
    try:
        with _offline_mode() if offline else nullcontext():
            yield place
    except CdpoError:
        raise
    except Exception as error:
        reason, failure = told_by(error), "unreadable"
        if isinstance(error, OSError) and error.filename:  # a file of the folder's
            reason += f": {error.filename}"
        key = what.partition("=")[0] if "=" in what else path
        kept = os.path.join(constants.HF_HUB_CACHE, f"models--{place.replace('/', '--')}/snapshots")
        if offline and not os.path.exists(kept):
            reason = "it is no folder, and not in the hub's cache"
        if offline and (isinstance(error, OSError) or not os.path.exists(kept)):
            reason, failure = f"{reason} (offline: {offline})", "unreachable"
        found = Path(kept if is_remote else place)
        remedy = _remedy(found, key, kind, error) if place else None
        verdict = "is not to be had" if failure == "unreachable" else f"is no {kind}"
        told = f"{subject} {verdict}: {reason}" + (f"; {remedy}" if remedy else "")
        raise OutsideError(told, key, failure) from None


MOST_FILES = 1000  # of a folder that are looked at for a reason
# Weights of a variant: `model.fp16.safetensors`, `diffusion_pytorch_model.non_ema.bin`.
VARIANT = re.compile(r"(model|(?:diffusion_)?pytorch_model)\.(\w+)\.(?:safetensors|bin)")
SINGLE_FILES = {"model.vae": "AutoencoderKL", "model.unet": "UNet2DConditionModel"}


def _remedy(place: Path, key: str | None, kind: str, error: Exception) -> str | None:
    """What to do about a folder or file that could not be read, where its files show that."""
    files = sorted(islice(place.rglob("*"), MOST_FILES)) if place.is_dir() else [place]
    for file in files:
        if file.is_file() and is_lfs_pointer(file):
            return f"{file} {LFS_REMEDY}"
    if place.is_file() and key in ("model.path", "model.teacher", *SINGLE_FILES):
        pipeline = f"StableDiffusion{'XL' if 'XL' in kind or 'sdxl' in kind else ''}Pipeline"
        maker = SINGLE_FILES.get(key, pipeline)
        code = f"{maker}.from_single_file({str(place)!r}).save_pretrained({place.stem!r})"
        return (
            "it is a single file: make a folder of it, where the hub can be reached, with "
            f'python -c "from diffusers import {maker}; {code}"'
        )
    if (place / "open_clip_config.json").exists():
        return "it is a folder of open_clip: the model is wanted in transformers' format"
    if re.search("no file named|no such modeling files", str(error)):
        for file in files:
            found = VARIANT.fullmatch(file.name)
            if found and not any(
                file.with_name(f"{found[1]}.{ending}").exists() for ending in ("safetensors", "bin")
            ):
                with_it = (
                    f"model.variant={found[2]}" if key and key[:6] == "model." else "that name"
                )
                return f"{file} is there: {with_it} reads it"
    return None


@cache
def why_offline(endpoint: str) -> str | None:
    """Why the hub will not be asked, in a process; None if it answers, whatever it says.

    Asked once, by the hub's own client, so that proxies and mirrors count. The client's waiting is
    bounded from outside, because looking up a name may take longer than any time-out it knows.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", SECONDS_TO_ANSWER))
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=seconds, follow_redirects=False)
            reasons.append(None)
        except Exception as error:
            reasons.append(told_by(error))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 0.5)
    reason = reasons[0] if reasons else "no answer"
    return reason and f"{endpoint} is not reached in HF_HUB_ETAG_TIMEOUT={seconds:g} s: {reason}"


@contextmanager
def _offline_mode() -> Iterator[None]:
    """The libraries' own, for a while: shards from a hub are read by other rules."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_network(
    network: type[ModelMixin],
    path: str,
    dtype: torch.dtype,
    *,
    key: str,
    kind: str,
    variant: str | None = None,
) -> Any:
    """A network that the recipe names under ``key``: a folder or hub id of its own, or a whole
    pipeline, of which the denoiser is meant. Its weights are of ``variant`` if there are such.
    """
    with reading(f"{key}={path}", kind, path) as place:
        config_of(network, place)
        subfolder = _subfolder(network, place)
        options = {"subfolder": subfolder, "dtype": dtype}
        loaded = of_variant(partial(network.from_pretrained, place, **options), variant)
        refuse_missing_weights(loaded, kind)
    return loaded


def config_of(
    network: type[ModelMixin], place: str, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The config of a network in a folder or hub id of its own, or in a whole pipeline. ValueError
    if it is of another class: it would be read as one full of defaults, a network of full size.
    """
    inside = subfolder or _subfolder(network, place)
    config: dict[str, Any] = network.load_config(place, subfolder=inside, revision=revision)
    found = config.get("_class_name", "something else")
    if found != network.__name__:
        raise ValueError(f"it holds a {found}, not a {network.__name__}")
    return with_defaults(network, config)


def with_defaults(made: type[Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config as what is made of it takes it: files of older versions lack newer options."""
    options = inspect.signature(made.__init__).parameters.values()
    given = {o.name: o.default for o in options if o.default is not inspect.Parameter.empty}
    return given | config


def denoiser_in(parts: Iterable[str]) -> str:
    """What a pipeline with parts of these names calls its denoiser, as does its folder."""
    return "transformer" if "transformer" in parts else "unet"


def _subfolder(network: type[ModelMixin], place: str) -> str | None:
    """Where a denoiser lies in a whole pipeline; a VAE is given by its own folder."""
    if issubclass(network, AutoencoderMixin):
        return None
    try:
        return denoiser_in(DiffusionPipeline.load_config(place))
    except OSError:
        return None


def of_variant(read: Callable[..., Any], variant: str | None) -> Any:
    """What ``read(variant=...)`` gives: as in diffusers, a variant need not exist of every part."""
    try:
        return read(variant=variant)
    except OSError as error:
        if variant is not None:
            with suppress(OSError):
                return read(variant=None)
        raise error from None


def read_text_encoder(
    encoder: type[PreTrainedModel], place: str, spec: Model, name: str, dtype: torch.dtype
) -> Any:
    """A text encoder of ``spec.path``, read from ``place``, from its folder ``name``.

    transformers makes up the tensors that a file lacks, from random numbers, and a pipeline hides
    that it did. Raises ValueError for them, and what transformers raises for unreadable folders.
    """
    options = {"subfolder": name, "revision": spec.revision, "dtype": dtype}
    read = partial(encoder.from_pretrained, place, output_loading_info=True, **options)
    loaded, report = of_variant(read, spec.variant)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of its {name} lack {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    return loaded


def has_weights_of(place: str, name: str, revision: str | None) -> bool:
    """Whether weights of the part ``name`` are on this machine: in the folder ``place``, or in the
    hub's cache of that id.
    """
    if not os.path.exists(place):
        try:
            place = snapshot_download(place, revision=revision, local_files_only=True)
        except (OSError, ValueError):
            return False
    endings = ("*.safetensors", "*.bin")
    return any(next(Path(place, name).glob(ending), None) for ending in endings)


def refuse_missing_weights(module: nn.Module, name: str) -> None:
    """ValueError if the files held no value for some parameter: it has no data to compute with."""
    missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the weights of its {name} lack {missing[0]}")
