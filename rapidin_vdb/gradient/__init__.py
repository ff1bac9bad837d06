"""Models, and the gradients of samples, layer by layer."""

from rapidin_vdb.gradient.device import resolve_devices
from rapidin_vdb.gradient.fingerprint import check_fingerprint, fingerprint_of, hash_of_tokenizer
from rapidin_vdb.gradient.generation import Said, generate_one, prompt_ids
from rapidin_vdb.gradient.influence import Direction, Exact, ExactInfluence
from rapidin_vdb.gradient.likelihood import batch_tokens_for, evaluate_losses
from rapidin_vdb.gradient.memory import default_batch_tokens, if_it_fits, release_memory, weight_bytes
from rapidin_vdb.gradient.model import LoadedModel, check_loadable, load_config, load_model
from rapidin_vdb.gradient.pair import tell_of_base, tell_of_pair, tell_of_weights, weights_of
from rapidin_vdb.gradient.places import check_places
from rapidin_vdb.gradient.rapidgrad import RapidGradMaker
from rapidin_vdb.gradient.receivers import norms_of
from rapidin_vdb.gradient.sample import stream_gradient
from rapidin_vdb.gradient.token_rapidgrad import TokenRapidGradMaker, check_token_width
from rapidin_vdb.gradient.tokenizer import load_tokenizer

__all__ = [
    "Direction",
    "Exact",
    "ExactInfluence",
    "LoadedModel",
    "RapidGradMaker",
    "Said",
    "TokenRapidGradMaker",
    "batch_tokens_for",
    "check_fingerprint",
    "check_loadable",
    "check_places",
    "check_token_width",
    "default_batch_tokens",
    "evaluate_losses",
    "fingerprint_of",
    "generate_one",
    "hash_of_tokenizer",
    "if_it_fits",
    "load_config",
    "load_model",
    "load_tokenizer",
    "norms_of",
    "prompt_ids",
    "release_memory",
    "resolve_devices",
    "stream_gradient",
    "tell_of_base",
    "tell_of_pair",
    "tell_of_weights",
    "weight_bytes",
    "weights_of",
]
