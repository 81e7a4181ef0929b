"""The check before a run: what it trains, what that costs, and whether something looks wrong."""
from .before import check as check
