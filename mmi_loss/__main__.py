"""``python -m mmi_loss doctor``: the command ``mmi-loss``, where it is not installed."""

import sys

from mmi_loss.doctor import main

sys.exit(main())
