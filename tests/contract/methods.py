"""The matrix: a new method joins every contract by adding a row here."""

METHODS = {
    "dmd2": {"dmd2": {"fake_score_updates": 2}},
    "dmd2_gan": {"dmd2": {"fake_score_updates": 2, "gan": {"student_weight": 0.01}}},
    "dmd2_guided_4_steps": {
        "dmd2": {"fake_score_updates": 2, "guidance_scale": 2.0},
        "sampler": {"steps": 4},
    },
    "sim": {},
    "sim_sid_guided": {"sim": {"objective": "sid", "weight": "sid", "guidance_scale": 2.0, "fake_score_updates": 2}},
    "swiftbrush": {"swiftbrush": {"null_probability": 0.5}},
    "swiftbrush_random_guidance_4_steps": {
        "swiftbrush": {"guidance_range": [0.5, 4.0], "fake_score_guidance": "none"},
        "sampler": {"steps": 4},
    },
    "disback": {"disback": {"nodes": 2, "updates": 3, "hold": 1, "probe": 4}, "dmd2": {"fake_score_updates": 2}},
    "disback_sim": {"disback": {"base": "sim", "nodes": 2, "updates": 3, "hold": 1, "spacing": "updates", "probe": 4}},
    "disback_swiftbrush": {
        "disback": {"base": "swiftbrush", "nodes": 2, "updates": 2, "hold": 1, "probe": 4, "guidance_scales": [1.5]}
    },
}
"""Config sections by row; a row's method is the name up to the first underscore."""

TEACHERS = ["unet2d", "stable_diffusion"]
WEIGHTS = ["full", "shared", "mixed"]
