// C entry points of single kernels for the tests: flat arguments, no torch.
#include "megasparse/gate.h"
#include "megasparse/gather_nt.h"

using namespace megasparse;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t test_gate_workspace_bytes(int64_t h, int64_t d, int has_order) {
  return static_cast<int64_t>(gate_workspace_bytes(h, d, has_order != 0));
}

EXPORT int test_gate(const void* x, const void* weight, const void* order, void* workspace, void* mask, void* arena,
                     const void* run_if, int64_t m, int64_t d, int64_t h, int sm_count, void* stream) {
  GateParams p{};
  p.x = x;
  p.weight = weight;
  p.order = static_cast<const int32_t*>(order);
  p.workspace = workspace;
  p.mask = static_cast<uint64_t*>(mask);
  p.arena = arena;
  p.run_if = static_cast<const int32_t*>(run_if);
  p.m = m;
  p.d = d;
  p.h = h;
  p.sm_count = sm_count;
  return launch_gate(p, static_cast<cudaStream_t>(stream));
}

EXPORT int64_t test_gather_nt_plan_bytes(int64_t m, int64_t h) { return static_cast<int64_t>(gather_nt_plan_bytes(m, h)); }
EXPORT int64_t test_gather_nt_partials(int64_t m, int64_t h) { return gather_nt_max_units(m, h) * kGatherNtPartials; }
EXPORT int64_t test_gather_nt_partials_per_unit() { return kGatherNtPartials; }

EXPORT int test_gather_nt_plan(const void* union_count, int64_t m, int64_t h, void* plan, void* stream) {
  return launch_gather_nt_plan(static_cast<const int32_t*>(union_count), m, h, static_cast<int32_t*>(plan),
                               static_cast<cudaStream_t>(stream));
}

// pointers: a, weight, order, union_idx, union_count, plan, row_ptr, base, g_compact, u_compact, u_packed, dg_packed,
// du_packed, h_packed, l1_grad, token_mask, l1_partial, run_if.
EXPORT int test_gather_nt(int mode, void* const* pointers, int64_t capacity, int64_t m, int64_t d, int64_t h, int sm_count,
                          void* stream) {
  GatherNtParams p{};
  p.mode = static_cast<GatherNtMode>(mode);
  p.a = pointers[0];
  p.weight = pointers[1];
  p.order = static_cast<const int32_t*>(pointers[2]);
  p.union_idx = static_cast<const int32_t*>(pointers[3]);
  p.union_count = static_cast<const int32_t*>(pointers[4]);
  p.plan = static_cast<const int32_t*>(pointers[5]);
  p.row_ptr = static_cast<const int64_t*>(pointers[6]);
  p.base = static_cast<const uint16_t*>(pointers[7]);
  p.g_compact = pointers[8];
  p.u_compact = pointers[9];
  p.u_packed = pointers[10];
  p.dg_packed = pointers[11];
  p.du_packed = pointers[12];
  p.h_packed = pointers[13];
  p.l1_grad = static_cast<const float*>(pointers[14]);
  p.token_mask = static_cast<const uint8_t*>(pointers[15]);
  p.l1_partial = static_cast<float*>(pointers[16]);
  p.run_if = static_cast<const int32_t*>(pointers[17]);
  p.capacity = capacity;
  p.m = m;
  p.d = d;
  p.h = h;
  p.sm_count = sm_count;
  return launch_gather_nt(p, static_cast<cudaStream_t>(stream));
}
