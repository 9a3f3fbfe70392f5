"""The matrix: a new method joins every contract by adding a row here."""

METHODS = {
    "dmd2": {"dmd2": {"fake_score_updates": 2}},
    "dmd2_gan": {"dmd2": {"fake_score_updates": 2, "gan": {"student_weight": 0.01}}},
    "dmd2_guided_4_steps": {
        "dmd2": {"fake_score_updates": 2, "guidance_scale": 2.0},
        "sampler": {"steps": 4},
    },
}
"""Config sections by row; a row's method is the name up to the first underscore."""

TEACHERS = ["unet2d", "stable_diffusion"]
WEIGHTS = ["full", "shared", "mixed"]
