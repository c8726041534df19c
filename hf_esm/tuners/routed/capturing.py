"""Hidden states and attentions of models that share blocks, as the models of all tasks share the routed body."""

from transformers import PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks


def capture_once(model: PreTrainedModel) -> None:
    """Install the hooks with which Transformers captures outputs of a model's modules, each hook once.

    Transformers does not notice that another model has already installed hooks on modules that both share.
    """
    maybe_install_capturing_hooks(model)
    for module in model.modules():
        seen = set()
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                variables = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
                output = variables["key"].cell_contents, variables["index"].cell_contents
                if output in seen:
                    del module._forward_hooks[key]
                seen.add(output)
