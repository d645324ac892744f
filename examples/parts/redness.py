"""A reward of your own: any function of images and prompts. `prompt.metadata` holds what the prompt file says beside the text."""


def redness(images, prompts):
    """How much redder than green and blue the picture is, or less so where the prompt file says {"avoid": "red"}."""
    red = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    return [value * (-1 if prompt.metadata.get("avoid") == "red" else 1) for value, prompt in zip(red.tolist(), prompts, strict=True)]
