"""How well a list of animals follows its instruction."""

from uniapl.rewards import RewardResult, verifier_field


def animal_list(prompt, response):
    names = [name.strip() for name in response.split(",")]
    checks = {
        "animals:count": len(names) == verifier_field(prompt, "count"),
        "animals:one_word_each": all(len(name.split()) == 1 for name in names),
        "animals:no_repeats": len(set(names)) == len(names),
    }
    return RewardResult(sum(checks.values()) / len(checks), checks)
