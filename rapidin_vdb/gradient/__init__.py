"""Models, and the gradients of samples, layer by layer."""

from rapidin_vdb.gradient.fingerprint import fingerprint_of
from rapidin_vdb.gradient.model import LoadedModel, load_model, load_tokenizer
from rapidin_vdb.gradient.rapidgrad import RapidGradMaker
from rapidin_vdb.gradient.sample import stream_gradient

__all__ = ["LoadedModel", "RapidGradMaker", "fingerprint_of", "load_model", "load_tokenizer", "stream_gradient"]
