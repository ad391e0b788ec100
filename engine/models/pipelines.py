"""Loading the stock diffusers pipeline of a recipe, with the parts that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.schedulers import SchedulerMixin
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..basics.errors import told_by
from ..recipe import Model
from ..recipe.family import family_that_reads
from .checks import Config, check_flow_schedule, check_schedule
from .pretrained import (
    config_of,
    denoiser_in,
    has_weights_of,
    read_network,
    read_text_encoder,
    reading,
    refuse_missing_weights,
    with_defaults,
)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# What names of parts begin with that read prompts, and that make embeddings.
READERS = ("tokenizer", "processor")
TEXT_PARTS = ("text_encoder", *READERS)
# What a scheduler's config says of the model's noise; the rest of it says how to sample.
NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
# The same of a flow model, and how many timesteps there are.
FLOW_KEYS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
    "time_shift_type",
)
# The same of a flow model that is sampled by a solver.
SOLVER_KEYS = ("num_train_timesteps", "flow_shift", "use_flow_sigmas", "prediction_type")


Check = Callable[[Model, Config, Config], None]
"""(recipe's model, config of the denoiser, of the VAE): OutsideError unless they go together."""
CheckText = Callable[[Model, Config, Mapping[str, Any]], None]
"""(recipe's model, config of the denoiser, configs of the text encoders that are there): the same.
"""


def load_pipeline(
    spec: Model,
    dtype: torch.dtype,
    *,
    reads_text: bool = True,
    check: Check | None = None,
    check_text: CheckText | None = None,
    pipeline_class: type[DiffusionPipeline] | None = None,
    scheduler_class: type[SchedulerMixin] = DDIMScheduler,
    **options: Any,
) -> Any:
    """The pipeline of a folder or hub id, with the recipe's own denoiser and VAE if it names them.

    Args:
        spec: path, revision, variant and replacements; its family says what the folder must hold.
        dtype: of every network but the VAE, which is float32.
        reads_text: whether text encoders are read; else they are there as their configs have them,
            without values (on the meta device).
        check: is asked before weights are read.
        check_text: likewise.
        pipeline_class: that of the folder, where the family's would not do.
        scheduler_class: how a UNet's pipeline samples, on the schedule that its folder describes;
            that of a flow model stays.
        options: further arguments of `pipeline_class.from_pretrained`.

    Raises:
        OutsideError: names the folder and what it lacks, or the backbone that fits it.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    family, kind = spec.family, spec.family.title
    denoiser, vae = getattr(diffusers, family.denoiser), getattr(diffusers, family.vae)
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
        tokenizers = _tokenizers_of_processors(place, index, spec)
        _refuse_absent_libraries({name: of for name, of in index.items() if name not in tokenizers})
        own = denoiser_in(index)
        scheduler = _scheduler(place, index, spec)
    (check_flow_schedule if spec.is_flow else check_schedule)(spec, scheduler)
    pipeline_class = pipeline_class or _pipeline_class(index, spec)
    chosen = {
        own: (denoiser, "model.unet", spec.unet, dtype),
        "vae": (vae, "model.vae", spec.vae, torch.float32),
    }
    configs = {name: _config(spec, name, *of[:3]) for name, of in chosen.items() if check}
    if check is not None:
        check(spec, *configs.values())
    if check_text is not None:
        with reading(f"model.path={spec.path}", kind, spec.path) as place:
            texts = _text_configs(place, index, spec)
        check_text(spec, configs[own], texts)
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        encoders = _text_encoders(place, index, spec, dtype if reads_text else None)
    replaced = {
        name: read_network(network, path, dtype, key=key, kind=_told(name), variant=spec.variant)
        for name, (network, key, path, dtype) in reversed(chosen.items())
        if path is not None
    }
    with reading(f"model.path={spec.path}", kind, spec.path) as place:
        pipeline = pipeline_class.from_pretrained(
            place,
            dtype={"vae": torch.float32, "default": dtype},
            revision=spec.revision,
            variant=spec.variant,
            scheduler=scheduler,
            **dict.fromkeys(tokenizers),  # diffusers would take none but the processor
            **encoders,
            **replaced,
            **options,
        )
        pipeline.register_modules(**tokenizers)
        _refuse_without_readers(pipeline.components, spec)
        for name, part in ((_told(own), getattr(pipeline, own)), ("VAE", pipeline.vae)):
            refuse_missing_weights(part, name)
    if not spec.is_flow:
        can = f"model that {scheduler_class.__name__} can sample"
        with reading(f"model.path={spec.path}", can):
            pipeline.scheduler = sampling_with(scheduler_class, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampling_with(scheduler_class: type[SchedulerMixin], own: SchedulerMixin) -> Any:
    """Another scheduler on the noise schedule of a model's own, ``own``.

    What a folder's config leaves out has the defaults of the scheduler that it names. Given that
    scheduler's config, diffusers fills the same gaps with the defaults of ``scheduler_class``:
    right for how to sample, but betas are the model's (0.0001 to 0.02 for DDIM, 0.00085 to 0.012
    for LCM).
    """
    config = dict(own.config)
    gaps = set(config.pop("_use_default_values", ())) - set(NOISE_KEYS)
    given = {key: value for key, value in config.items() if key not in gaps}
    # Latents are not pixels in [-1, 1], to which some folders would have them clipped.
    return scheduler_class.from_config({**given, "clip_sample": False})


def pipeline_index(place: str, spec: Model) -> dict[str, Any]:
    """What model_index.json says: the class of the pipeline (`_class_name`), and of its parts."""
    index: dict[str, Any] = DiffusionPipeline.load_config(place, revision=spec.revision)
    for name, entry in index.items():
        is_entry = isinstance(entry, list) and len(entry) == 2
        if name.startswith((*TEXT_PARTS, "scheduler")) and not is_entry:
            raise ValueError(
                f"its model_index.json says {entry!r} of {name}, where a library and a class are "
                'wanted, as ["transformers", "CLIPTokenizer"]'
            )
    return index


def refuse_other_family(index: dict[str, Any], spec: Model) -> None:
    """ValueError with the backbone that fits, where that is another one than the recipe's; of a
    flow model for whatever it does not read, which may share all of its parts: FLUX.1 Kontext
    edits images, SANA-Sprint is a consistency model.
    """
    found = index.get("_class_name")
    fitting = family_that_reads(found)
    if fitting and found not in spec.family.pipelines:
        raise ValueError(f"it holds a {found}: model.backbone={fitting} fits, not {spec.backbone}")
    if spec.is_flow and found is not None and found not in spec.family.pipelines:
        raise ValueError(
            f"it holds a {found}, which is not supported: model.backbone={spec.backbone} reads "
            f"{' and '.join(spec.family.pipelines)}"
        )


def _tokenizers_of_processors(
    place: str, index: dict[str, Any], spec: Model
) -> dict[str, PreTrainedTokenizerBase]:
    """What stands for a ``tokenizer`` that is a processor, as FLUX.2 dev's: of texts alone it makes
    the same, and it needs no library for pictures.
    """
    return {
        name: _reader(PreTrainedTokenizerFast, place, name, spec)
        for name, entry in index.items()
        if name.startswith("tokenizer") and str(entry[1]).endswith("Processor")
    }


def _reader(kind: Any, place: str, name: str, spec: Model) -> Any:
    """A tokenizer or processor; ValueError, which names the part, if its files are no such."""
    try:
        return kind.from_pretrained(place, subfolder=name, revision=spec.revision)
    except OSError:
        raise
    except Exception as error:  # which may be anything
        raise ValueError(
            f"files in its {name}/ are damaged or missing: {told_by(error)}"
        ) from error


def _refuse_without_readers(parts: Mapping[str, Any], spec: Model) -> None:
    """ValueError for a text encoder that has nothing to read prompts with, or a chat without its
    template.
    """
    for encoder in (name for name in TEXT_ENCODERS if parts.get(name) is not None):
        own = encoder.replace("text_encoder", "tokenizer")
        name = "processor" if "processor" in parts else own
        if parts.get(name) is None:
            raise ValueError(f"its model_index.json has a {encoder}, but no {name} for it")
        if spec.family.chats and not parts[name].chat_template:
            raise ValueError(
                f"its {name} has no chat template, in which prompts are given to the {encoder}: "
                f"{name}/chat_template.jinja is missing"
            )


def _refuse_absent_libraries(index: dict[str, Any]) -> None:
    """ValueError for a tokenizer or processor that needs a library which is not there: diffusers
    would tell of its own search alone.
    """
    for name in (name for name in index if name.startswith(READERS)):
        library, class_name = index[name]
        part: Any = getattr(transformers, class_name, None) if library == "transformers" else None
        if _reads_videos(part):
            part = transformers.AutoVideoProcessor
        if getattr(part, "is_dummy", False):
            raise ValueError(f"its {name}, a {class_name}, needs {' and '.join(part._backends)}")


def _reads_videos(part: Any) -> bool:
    is_processor = isinstance(part, type) and issubclass(part, transformers.ProcessorMixin)
    return is_processor and "video_processor" in part.get_attributes()


def _scheduler(place: str, index: dict[str, Any], spec: Model) -> SchedulerMixin:
    library, name = index.get("scheduler", (None, None))
    if library != "diffusers":
        raise ValueError("its model_index.json has no scheduler of diffusers")
    made: SchedulerMixin = getattr(diffusers, name).from_pretrained(
        place, subfolder="scheduler", revision=spec.revision
    )
    return made


def _text_classes(index: dict[str, Any]) -> dict[str, Any]:
    """Of the text encoders that are there, by their names in the pipeline."""
    entries = {name: index.get(name, (None, None)) for name in TEXT_ENCODERS}
    return {
        name: getattr(transformers, class_name)
        for name, (library, class_name) in entries.items()
        if library == "transformers"
    }


def _text_configs(place: str, index: dict[str, Any], spec: Model) -> dict[str, Any]:
    return {
        name: encoder.config_class.from_pretrained(place, subfolder=name, revision=spec.revision)
        for name, encoder in _text_classes(index).items()
    }


def _text_encoders(
    place: str, index: dict[str, Any], spec: Model, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Those of transformers, by their names in the pipeline, and what text part it lacks; without
    values where there is no ``dtype``.
    """
    classes = _text_classes(index)
    if dtype is None:
        with torch.device("meta"):
            configs = _text_configs(place, index, spec)
            found: dict[str, Any] = {name: classes[name](own) for name, own in configs.items()}
    else:
        found = {
            name: read_text_encoder(encoder, place, spec, name, dtype)
            for name, encoder in classes.items()
        }
    # What is null there, as the T5 of Stable Diffusion 3 may be, is null if it is said once more.
    absent = [name for name, entry in index.items() if entry == [None, None]]
    return found | {name: None for name in absent if name.startswith(TEXT_PARTS)}


def _pipeline_class(index: dict[str, Any], spec: Model) -> Any:
    own, known = index.get("_class_name"), spec.family.pipelines
    return getattr(diffusers, own if own in known else known[0])


def pipeline_config(spec: Model) -> dict[str, Any]:
    """That of the pipeline of a recipe's model. OutsideError if it is of another family."""
    with reading(f"model.path={spec.path}", spec.family.title, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
        return with_defaults(_pipeline_class(index, spec), index)


def text_parts_here(spec: Model, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """The tokenizers of a recipe's model by their names, then its text encoders, one after another
    in host memory.

    Raises FileNotFoundError for weights that are not on this machine, and OutsideError for those
    that cannot be read.
    """
    with reading(f"model.path={spec.path}", spec.family.title, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
        readers: dict[str, Any] = dict(_tokenizers_of_processors(place, index, spec))
        entries = {name: of for name, of in index.items() if name not in readers}
        _refuse_absent_libraries(entries)
        readers |= {
            name: _reader(getattr(transformers, of[1]), place, name, spec)
            for name, of in entries.items()
            if name.startswith(READERS) and of[0] is not None
        }
    yield from readers.items()
    for name, encoder in _text_classes(index).items():
        if not has_weights_of(place, name, spec.revision):
            raise FileNotFoundError(name)
        with reading(f"model.path={spec.path}", spec.family.title, spec.path):
            read = read_text_encoder(encoder, place, spec, name, dtype)
        yield name, read
        del read


def denoiser_and_index(spec: Model) -> tuple[Config, Config]:
    """The config of the denoiser of a recipe's model, and its model_index.json; OutsideError if
    there is none.
    """
    with reading(f"model.path={spec.path}", spec.family.title, spec.path) as place:
        index = pipeline_index(place, spec)
        refuse_other_family(index, spec)
    network = getattr(diffusers, spec.family.denoiser)
    return _config(spec, denoiser_in(index), network, "model.unet", spec.unet), index


def _config(
    spec: Model, name: str, network: type[ModelMixin], key: str, path: str | None
) -> Config:
    """That of the part of a recipe's pipeline. OutsideError if there is none."""
    where, chosen = (path, key) if path else (spec.path, "model.path")
    with reading(f"{chosen}={where}", f"{_told(name)} or model with one", where) as place:
        inside = () if path else (name, spec.revision)
        return config_of(network, place, *inside)


def _told(part: str) -> str:
    """A part's name as messages say it."""
    return {"unet": "UNet", "vae": "VAE"}.get(part, part)
