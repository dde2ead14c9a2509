"""The task of the class that a config.json names in `architectures`, and whether it is served.

`from_pretrained` of a causal language model ignores the name and builds the causal class of the
`model_type`, also of a classifier's body. A number about that would be about another function than
the one that was trained, so here the name decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import transformers
from hvp_folders.config import sections
from hvp_folders.weights import CONFIG
from hvp_operations.wording import shown
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from hvp_core.errors import CurvatureError

# Families of classes that say what a model is pretrained or embedded in, and not what it is for.
_NO_TASK = ("PRETRAINING", "BACKBONE", "TEXT_ENCODING", "IMAGE", "RETRIEVAL")
_CAUSAL = "causal language modelling"
_CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
Task = Literal["causal language modelling", "sequence classification"]
_WORDS = {
    "causal lm": _CAUSAL,
    "masked lm": "masked language modelling",
    "seq to seq causal lm": "sequence-to-sequence language modelling",
    "multimodal lm": "multimodal language modelling",
    "image text to text": "image and text to text",
}
# How causal language models are called, also by libraries that derive their own.
_CAUSAL_SUFFIXES = ("forcausallm", "lmheadmodel")


def task_of(raw: Mapping[str, Any], config: PreTrainedConfig) -> Task:
    """The task of a checkpoint, by the class that it names; a task that is not served is refused.

    Args:
        raw: config.json.
        config: The config that transformers made from it.

    Returns:
        The task whose class of this type is to be built.

    Raises:
        CurvatureError: TASK_UNSUPPORTED, ARCHITECTURE_UNKNOWN, REMOTE_CODE_REFUSED, CONFIG_INVALID.
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CurvatureError(
            "CONFIG_INVALID",
            "architectures in config.json is not a list of class names; give it as save_pretrained "
            "writes it, or leave it out",
            {"file": CONFIG, "key": "architectures"},
        )
    kind = raw["model_type"]
    if names and names[0] in _classes(_CLASSIFIERS, kind):
        return "sequence classification"
    _check_causal(names, raw, config)
    return "causal language modelling"


def _check_causal(names: Sequence[str], raw: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Refuse what is no causal language model."""
    kind = raw["model_type"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        refuse_remote_code(raw, f"transformers has no causal language model of type {shown(kind)}")
        if names and (task := _task(names[0])) not in ("", _CAUSAL):
            raise _task_refused(names[0], task, kind)
        raise CurvatureError(
            "ARCHITECTURE_UNKNOWN",
            f"transformers has no causal language model of type {shown(kind)}; give a checkpoint "
            "of one",
            {"model_type": kind},
        )
    built = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    own = {built, *_classes(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind)}
    bodies = _classes(modeling_auto.MODEL_MAPPING_NAMES, kind)
    both_ways = _reads_both_ways(kind, config)
    if not both_ways:
        own |= bodies  # a body says nothing of a task, and a tied head needs no tensor of its own
    elif not names:
        raise CurvatureError(
            "CONFIG_INVALID",
            f"config.json names no class in architectures, and a model of type {shown(kind)} may "
            "be an encoder, which is no causal language model; name the class that it was saved as",
            {"file": CONFIG, "key": "architectures"},
        )
    folded = {name.lower() for name in own}  # some names have changed case over the years
    if not names or any(name.lower() in folded for name in names):
        return
    name = names[0]
    task = "that of an encoder" if name in bodies else _task(name)
    if task == _CAUSAL:
        raise CurvatureError(
            "CONFIG_INVALID",
            f"config.json names the class {name}, which is not of its model_type {shown(kind)}; "
            "take the config.json that the model came with",
            {"file": CONFIG, "key": "architectures"},
        )
    if task:
        raise _task_refused(name, task, kind)
    refuse_remote_code(raw, f"transformers has no class {name}")
    if not name.lower().endswith(_CAUSAL_SUFFIXES):
        raise CurvatureError(
            "ARCHITECTURE_UNKNOWN",
            f"config.json names the class {name}, which transformers does not have; name {built} "
            "in architectures if these are its weights",
            {"model_type": kind, "class": name},
        )
    # What is left is a class derived from the type's own, which transformers reads as that.


def refuse_remote_code(raw: Mapping[str, Any], why: str) -> None:
    """Refuse a config that asks for code of its own; called where transformers lacks the class.

    Args:
        raw: config.json.
        why: The class or type that transformers lacks, in words.

    Raises:
        CurvatureError: REMOTE_CODE_REFUSED.
    """
    if any(section.get("auto_map") for section in sections(raw)):
        raise CurvatureError(
            "REMOTE_CODE_REFUSED",
            f"config.json asks to run code that comes with the model (auto_map), and {why}; such "
            "code is never run: give a checkpoint of an architecture that transformers has itself",
            {"file": CONFIG},
        )


def _task_refused(name: str, task: str, kind: str) -> CurvatureError:
    return CurvatureError(
        "TASK_UNSUPPORTED",
        f"config.json says that this is {name}, a model whose task is {task}; causal language "
        "models and sequence classifiers are served: give the checkpoint of one, or correct "
        "architectures in config.json if it is one",
        {"class": name, "task": task, "model_type": kind},
    )


def _classes(mapping: Mapping[str, Any], kind: str) -> set[str]:
    """The classes that a mapping of transformers has for a type of model."""
    names = mapping.get(kind, ())
    return {names} if isinstance(names, str) else set(names)


def _reads_both_ways(kind: str, config: PreTrainedConfig) -> bool:
    """Whether the body of this type is an encoder unless it is told otherwise."""
    mappings = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return any(kind in names for names in mappings) and not getattr(config, "is_decoder", False)


def _task(name: str) -> str:
    """The task of a class of transformers, in words; "" when transformers has no such class."""
    for variable, mapping in vars(modeling_auto).items():
        family = re.fullmatch(r"MODEL_FOR_(\w+)_MAPPING_NAMES", variable)
        if family is None or family[1] in _NO_TASK:
            continue
        if any(name in _classes(mapping, kind) for kind in mapping):
            words = family[1].replace("_", " ").lower()
            return _WORDS.get(words, words)
    return "another one" if hasattr(transformers, name) else ""
