"""Run file of two modes on a plane, for tests of commands: milliseconds a step, and no file but its own."""

TOY = """
policy: {class_path: GaussianMixturePolicy, init_args: {means: [[-1.0, 0.0], [1.0, 0.0]], scale: 0.3}}
objective: {class_path: SoftmaxTB, init_args: {beta: 2}}
sampler: {class_path: TreeSampler, init_args: {steps: 4, plan: {class_path: FixedPlan, init_args: {splits: [1, 2], branches: 2, eta: 0.5}}}}
rewards: JPEGCompressibility
prompts: {class_path: Prompts, init_args: {prompts: [one, two]}}
prompts_per_step: 1
"""
