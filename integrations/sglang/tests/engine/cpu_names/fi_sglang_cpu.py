"""For tests: fi under the names that SGLang's CPU engine insists on, and a word printed where fi is made."""

from fi_sglang import make_attention, make_sampler
from fi_sglang import register as register_fi


def _announced(make):
    def made(*arguments):
        print("made by fi-sglang:", make.__name__, flush=True)
        return make(*arguments)

    return made


def register():
    """The entry point; SGLang calls it in every process."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.sampler import register_sampler_backend

    register_fi()
    register_attention_backend("torch_native")(_announced(make_attention))
    register_sampler_backend("pytorch", _announced(make_sampler))
