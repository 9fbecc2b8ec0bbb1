"""Holdfast: protect pre-trained models against fine-tuning to a restricted domain, and audit whether it holds."""

from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.batteries import battery
from holdfast.audit import AuditSpec
from holdfast.defences.lockout import Lockout
from holdfast.defences.ntl import NTL
from holdfast.defences.ntp import NTP
from holdfast.defences.reverse_maml import ReverseMAML
from holdfast.defences.skd import SKD
from holdfast.defences.sophon import Sophon
from holdfast.defences.unsir import UNSIR
from holdfast.domains import DomainSpec, load_domain
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.losses import inverse_cross_entropy, inverse_logits_cross_entropy, kl_from_uniform
from holdfast.models import Architecture
from holdfast.pipeline import audit_checkpoint, load_model, run
from holdfast.recipes import Recipe, load_recipe
from holdfast.training import evaluate, fit

__version__ = "0.1.0"

__all__ = [
    "NTL",
    "NTP",
    "SKD",
    "UNSIR",
    "Architecture",
    "Attack",
    "AuditSpec",
    "DomainSpec",
    "FineTuning",
    "Lockout",
    "Recipe",
    "ReverseMAML",
    "Search",
    "Sophon",
    "UserError",
    "__version__",
    "audit_checkpoint",
    "battery",
    "evaluate",
    "fit",
    "inverse_cross_entropy",
    "inverse_logits_cross_entropy",
    "kl_from_uniform",
    "load_domain",
    "load_model",
    "load_recipe",
    "run",
]
