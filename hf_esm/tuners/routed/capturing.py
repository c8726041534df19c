"""Hidden states and attentions of models that share their blocks, as every task's model shares the routed body."""

from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def capture_once(model: PreTrainedModel) -> None:
    """Have Transformers put the hooks on a model's modules that capture what they put out, and take off those that
    stand there twice: it does not see that another model has put some on modules that both share.
    """
    maybe_install_capturing_hooks(model)
    for module in model.modules():
        seen = set()
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                held = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
                what = held["key"].cell_contents, held["index"].cell_contents
                if what in seen:
                    del module._forward_hooks[key]
                seen.add(what)
