// C entry points of the gathered down product and the weight gradients for the tests: flat arguments, no torch.
#include "megasparse/gather_down.h"
#include "megasparse/wgrad.h"

using namespace megasparse;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

GatherDownParams down_params(void* const* pointers, int64_t m, int64_t d, int64_t union_stride, int sm_count) {
  GatherDownParams p{};
  p.a0 = pointers[0];
  p.a1 = pointers[1];
  p.w0 = pointers[2];
  p.w1 = pointers[3];
  p.union_idx = static_cast<const int32_t*>(pointers[4]);
  p.order = static_cast<const int32_t*>(pointers[5]);
  p.block_ptr = static_cast<const int32_t*>(pointers[6]);
  p.tile_order = static_cast<const int32_t*>(pointers[7]);
  p.out = pointers[8];
  p.m = m;
  p.d = d;
  p.union_stride = union_stride;
  p.sm_count = sm_count;
  return p;
}

WgradParams wgrad_params(void* const* pointers, int output, int gated, int64_t m, int64_t h, int64_t d, int sm_count) {
  WgradParams p{};
  p.mask = static_cast<const int64_t*>(pointers[0]);
  p.offset = static_cast<const int16_t*>(pointers[1]);
  p.row_ptr = static_cast<const int64_t*>(pointers[2]);
  p.dg = pointers[3];
  p.du = pointers[4];
  p.h = pointers[5];
  p.x = pointers[6];
  p.dy = pointers[7];
  p.order = static_cast<const int32_t*>(pointers[8]);
  p.dw_in = pointers[9];
  p.dw_down = pointers[10];
  p.output = static_cast<WgradOutput>(output);
  p.gated = gated != 0;
  p.m = m;
  p.h_size = h;
  p.d = d;
  p.sm_count = sm_count;
  return p;
}

}  // namespace

// pointers: a0, a1, w0, w1, union_idx, order, block_ptr, tile_order, out.
EXPORT int64_t test_gather_down_bytes(void* const* pointers, int64_t m, int64_t d, int64_t union_stride, int sm_count) {
  return static_cast<int64_t>(gather_down_workspace_bytes(down_params(pointers, m, d, union_stride, sm_count)));
}
EXPORT int test_gather_down(void* const* pointers, int64_t m, int64_t d, int64_t union_stride, int sm_count,
                            void* workspace, void* stream) {
  return launch_gather_down(down_params(pointers, m, d, union_stride, sm_count), workspace,
                            static_cast<cudaStream_t>(stream));
}

// pointers: mask, offset, row_ptr, dg, du, h, x, dy, order, dw_in, dw_down.
EXPORT int64_t test_wgrad_bytes(void* const* pointers, int output, int gated, int64_t m, int64_t h, int64_t d,
                                int sm_count) {
  return static_cast<int64_t>(wgrad_workspace_bytes(wgrad_params(pointers, output, gated, m, h, d, sm_count)));
}
EXPORT int test_wgrad(void* const* pointers, int output, int gated, int64_t m, int64_t h, int64_t d, int sm_count,
                      void* workspace, void* stream) {
  return launch_wgrad(wgrad_params(pointers, output, gated, m, h, d, sm_count), workspace,
                      static_cast<cudaStream_t>(stream));
}
