"""Adapters that run in a trainer's process: no JAX there, only a client of the server.

trl.py         TRL: `trl_reward`, `trl_reward_async`; also with a Judge in place of a server
verl.py        verl: `compute_score`, `GRMRewardManager`
openrlhf.py    OpenRLHF: `openrlhf_reward`, for its Python file
slime.py       slime: `grm_reward`, for `--custom-rm-path` with or without `--group-rm`
verifiers.py   verifiers: `GRMJudge`, a judge plugin; `verifiers_reward`, a group reward
nemo_gym.py    NeMo Gym: `grm_server`, a resources server

groups.py      what they share: rollouts by their prompts, verdicts as rewards, failures

None needs its trainer to be imported. What a failed judgement becomes stands in each file, and is
never a number that the user did not ask for.
"""
