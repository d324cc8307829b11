"""Let DeepSpeed compile its C++ extensions, one after another, before several tests want them at a time.

It does so at their first use, for minutes; a test that is killed meanwhile leaves a lock, for which all later
ones would wait.
"""

from deepspeed.accelerator import get_accelerator

if __name__ == "__main__":
    for name in ("ShareMemCommBuilder", "CPUAdamBuilder"):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None:  # with a GPU, there is no need of the first one
            builder.load(verbose=False)
