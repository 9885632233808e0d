"""The merge of the quickstart on its own, from specialists that are there already.

The teachers are those of a finished quickstart in ``runs/quickstart``; name others with
``--set domains.math.teacher.path=FOLDER``.
"""

from posttrain.config import Recipe
from recipes import quickstart
from teachers.sources import HFTeacher


def recipe() -> Recipe:
    whole = quickstart.recipe()
    domains = {
        name: domain.replace(sft=None, grpo=None, teacher=HFTeacher(f"runs/quickstart/stages/grpo-{name}/final"))
        for name, domain in whole.domains.items()
    }
    return whole.replace(name="merge", domains=domains)
