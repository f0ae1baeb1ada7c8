"""The Space: `mmesid demo` with the settings of demo.yaml."""

from mmesid.trainer.stages import demo


demo.main(["demo.yaml"])
