"""Pictures that tests draw."""

from PIL import Image, ImageDraw


def draw_picture(size: int = 32, hue: int = 0) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    color = f"hsl({hue * 47 % 360}, 70%, 50%)"
    ImageDraw.Draw(image).ellipse((size // 8, size // 8, size - size // 8, size // 2), fill=color)
    return image
