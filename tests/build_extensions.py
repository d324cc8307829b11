"""Let DeepSpeed compile its AdamW for the host before several tests want it at a time.

It does so at its first use, for a minute or two; a test that is killed meanwhile leaves a lock, for which all
later ones would wait.
"""

from deepspeed.accelerator import get_accelerator

if __name__ == "__main__":
    get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)
