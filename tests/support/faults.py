"""A custom node of another pack, for servers of the tests: its MODEL fails at a chosen point of a run, once.

`install(base)` puts this file into a server's custom nodes.
"""
import shutil
from pathlib import Path

ENDS = ("interrupt", "error", "out of memory", "error in a block")


def install(base):
    """Make this file a custom node of the user data in a folder."""
    folder = base / "custom_nodes" / "faults"
    folder.mkdir(parents=True)
    shutil.copyfile(__file__, folder / "__init__.py")


if Path(__file__).name == "__init__.py":  # in a server
    import comfy.model_management
    from torch.utils._python_dispatch import TorchDispatchMode

    class _AtOperation(TorchDispatchMode):
        """Runs out of memory at an operation of torch."""

        def __init__(self, at):
            super().__init__()
            self.left = at

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.left -= 1
            if self.left < 0:
                raise comfy.model_management.OOM_EXCEPTION("no room for another tensor")
            return func(*args, **(kwargs or {}))

    class Fault:
        """A MODEL that ends a run at its n-th call (never where that is 0), or in the middle of it."""

        CATEGORY, FUNCTION, RETURN_TYPES = "tests", "make", ("MODEL",)

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"model": ("MODEL",), "end": (ENDS,), "call": ("INT", {"default": 0, "min": 0, "max": 9999}),
                                 "operation": ("INT", {"default": 0, "min": 0, "max": 99999}),
                                 "turn": ("INT", {"default": 0, "min": 0, "max": 99999})}}

        def make(self, model, end, call, operation, turn):
            model, calls = model.clone(), [0]
            blocks = list(model.model.diffusion_model.output_blocks)

            def wrapped(apply_model, args):
                calls[0] += 1
                def run():
                    return apply_model(args["input"], args["timestep"], **args["c"])

                if not call or calls[0] != call:
                    return run()
                if end == "interrupt":
                    comfy.model_management.interrupt_current_processing()
                    return run()
                if end == "error":
                    raise RuntimeError("the model fails")
                if end == "out of memory":
                    with _AtOperation(operation):
                        return run()
                handle = blocks[operation % len(blocks)][0].register_forward_hook(_fails)
                try:
                    return run()
                finally:
                    handle.remove()

            model.set_model_unet_function_wrapper(wrapped)
            return (model,)

    def _fails(*_):
        raise RuntimeError("the block fails")

    NODE_CLASS_MAPPINGS = {"TestFault": Fault}
