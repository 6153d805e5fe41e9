"""PLACEHOLDER by the lead until the configuration helper writes the real file (same schema)."""
from __future__ import annotations
from typing import Literal
from pydantic import BaseModel, ConfigDict
import math
class _M(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
class StatisticsConfig(_M):
    momentum: float = 0.9
class BudgetConfig(_M):
    mode: Literal["free"] = "free"
    alpha: float = 1.0
    beta: float = 2.0
    k_min: int = 1
    k_max: int = 4
    rounding: Literal["floor","nearest","ceil"] = "floor"
    def constant_k(self):
        if self.alpha != 0: return None
        r={"floor":math.floor,"nearest":round,"ceil":math.ceil}[self.rounding](self.beta)
        return max(self.k_min,min(self.k_max,r))
class CLBConfig(_M):
    enabled: bool = False
    start_step: int = 0
    warmup_steps: int = 0
    theta_start: float = -3.0
    theta: float = 0.0
    width: float = 0.25
    lambda_hi: float = 1.0
    lambda_lo: float = 0.1
    epsilon: float = 1e-6
class BiasConfig(_M):
    enabled: bool = False
    rate: float = 1e-3
    update: Literal["sign","proportional"] = "sign"
class StatesConfig(_M):
    entropy: float | None = None
    energy: float | None = None
class UARConfig(_M):
    policy: Literal["topk","uar"] = "topk"
    uncertainty: Literal["energy","entropy"] = "energy"
    temperature: float = 1.0
    statistics: StatisticsConfig = StatisticsConfig()
    budget: BudgetConfig = BudgetConfig()
    clb: CLBConfig = CLBConfig()
    bias: BiasConfig = BiasConfig()
    states: StatesConfig = StatesConfig()
def load_uar_section(path): raise NotImplementedError
