class MemoryPlan: pass
