// Attention called with PyTorch's tensors themselves: shapes are read, checked and the output made here, in 2 us, where
// Python takes 10. Only a plain, valid call on CPU tensors is done. Any other is declined, with nothing changed, and
// goes the ordinary way, which knows every option and finds the words for every mistake.
#include "abi.h"
#include "torch_tensors.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// The C entry points of dispatch.cpp.
#define KERNEL(NAME, ARGS) extern "C" int onepass_##NAME(const void*);
#include "kernels.def"
#undef KERNEL

namespace {

HostFunctions host;

constexpr int64_t MAX_HEAD_DIM = 256;

// A tensor as Python gives it to this call: a capsule with a handle that must be deleted when the call ends.
class Input {
 public:
  explicit Input(void* capsule) : handle_(capsule ? host.capsule_get_pointer(capsule, nullptr) : nullptr) {}
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;
  ~Input() {
    if (handle_) host.delete_tensor_object(handle_);
  }

  int32_t dtype;
  int64_t *sizes, *strides;
  void* data;

  // False unless this is an ordinary CPU tensor of that many dimensions.
  bool read(int64_t wanted_dim) {
    int32_t device, layout;
    int64_t dim;
    return !host.get_device_type(handle_, &device) && device == TORCH_CPU && !host.get_layout(handle_, &layout) &&
           layout == TORCH_STRIDED && !host.get_dim(handle_, &dim) && dim == wanted_dim &&
           !host.get_dtype(handle_, &dtype) && !host.get_sizes(handle_, &sizes) &&
           !host.get_strides(handle_, &strides) && !host.get_data_ptr(handle_, &data) && (data || empty(dim));
  }

  // Tensors without memory that are not empty are stand-ins of some kind: not ours.
  bool empty(int64_t dim) const {
    for (int64_t i = 0; i < dim; i++)
      if (sizes[i] == 0) return true;
    return false;
  }
  bool given() const { return handle_; }
  Tensor4 tensor4() const { return {data, strides[0], strides[1], strides[2], strides[3]}; }

 private:
  void* handle_;
};

int64_t kernel_dtype(int32_t dtype) {
  switch (dtype) {
    case TORCH_FLOAT32: return ONEPASS_F32;
    case TORCH_BFLOAT16: return ONEPASS_BF16;
    case TORCH_FLOAT16: return ONEPASS_F16;
    default: return -1;
  }
}

// The conditions of onepass/ops/attention: spec.qkv_sizes and kernels._cpu_unsupported.
bool fit(const Input& q, const Input& k, const Input& v, AttentionProblem& p) {
  p.dtype = kernel_dtype(q.dtype);
  p.batch = q.sizes[0], p.seqlen_q = q.sizes[1], p.nheads_q = q.sizes[2], p.head_dim = q.sizes[3];
  p.seqlen_k = v.sizes[1], p.nheads_kv = v.sizes[2], p.head_dim_v = v.sizes[3];
  return p.dtype >= 0 && k.dtype == q.dtype && v.dtype == q.dtype && k.sizes[0] == p.batch && v.sizes[0] == p.batch &&
         k.sizes[1] == p.seqlen_k && k.sizes[2] == p.nheads_kv && k.sizes[3] == p.head_dim && p.nheads_kv > 0 &&
         p.nheads_q >= p.nheads_kv && p.nheads_q % p.nheads_kv == 0 && p.head_dim > 0 && p.head_dim <= MAX_HEAD_DIM &&
         p.head_dim_v > 0 && p.head_dim_v <= MAX_HEAD_DIM;
}

// Windows end here, so that index arithmetic cannot overflow.
int64_t clamped(int64_t window) {
  constexpr int64_t FAR = int64_t(1) << 40;
  return window < FAR ? window : FAR;
}

// A new contiguous (batch, seqlen_q, nheads_q, head_dim_v) tensor; null when there is no memory.
void* new_output(const AttentionProblem& p, int32_t dtype, Tensor4& out) {
  const int64_t sizes[4] = {p.batch, p.seqlen_q, p.nheads_q, p.head_dim_v};
  // PyTorch's strides: an empty dimension counts as one.
  const auto at_least_one = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t stride_s = at_least_one(p.nheads_q) * p.head_dim_v;
  const int64_t strides[4] = {at_least_one(p.seqlen_q) * stride_s, stride_s, p.head_dim_v, 1};
  void* handle;
  if (host.empty_strided(4, sizes, strides, dtype, TORCH_CPU, 0, &handle)) return nullptr;
  out = {nullptr, strides[0], strides[1], strides[2], strides[3]};
  if (host.get_data_ptr(handle, &out.data)) {
    host.delete_tensor_object(handle);
    return nullptr;
  }
  return handle;
}

// The new output's handle; null: declined.
void* attend(Input& q, Input& k, Input& v, Input& cache_seqlens, const DirectAttentionArgs& args) {
  AttentionDecodeArgs call = {};
  AttentionProblem& p = call.problem;
  if (!q.read(4) || !k.read(4) || !v.read(4) || !fit(q, k, v, p)) return nullptr;
  if (cache_seqlens.given()) {
    if (!cache_seqlens.read(1) || cache_seqlens.dtype != TORCH_INT32 || cache_seqlens.sizes[0] != p.batch ||
        (cache_seqlens.strides[0] != 1 && p.batch > 1))
      return nullptr;
    call.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.data);
  }
  p.num_threads = args.num_threads;
  p.shift = args.bottom_right ? p.seqlen_k - p.seqlen_q : 0;
  p.window_left = clamped(args.window_left), p.window_right = clamped(args.window_right);
  p.softmax_scale = args.softmax_scale;
  call.q = q.tensor4(), call.k = k.tensor4(), call.v = v.tensor4();
  call.num_splits = args.num_splits;
  void* out = new_output(p, q.dtype, call.out);
  if (!out) return nullptr;
  const AttentionFwdArgs forward = {p, call.q, call.k, call.v, call.out, nullptr};
  if (args.decode ? onepass_attention_decode(&call) : onepass_attention_fwd(&forward)) {
    host.delete_tensor_object(out);
    return nullptr;
  }
  return out;
}

}  // namespace

// The addresses of HOST_FUNCTIONS, in that order.
EXPORT void onepass_bind_host(const HostFunctions* functions) { host = *functions; }

// Python's objects in, a capsule with the new output's handle out; or None, which the caller passes in: declined.
// cache_seqlens may be None too. The input handles are deleted either way. Called with the GIL held.
EXPORT void* onepass_direct_attention(void* q_capsule, void* k_capsule, void* v_capsule, void* cache_seqlens_capsule,
                                      void* none, const DirectAttentionArgs* args) {
  Input q(q_capsule), k(k_capsule), v(v_capsule);
  Input cache_seqlens(cache_seqlens_capsule == none ? nullptr : cache_seqlens_capsule);
  void* thread_state = host.release_gil();
  void* out = attend(q, k, v, cache_seqlens, *args);
  host.take_gil(thread_state);
  if (out) return host.capsule_new(out, nullptr, nullptr);
  host.incref(none);
  return none;
}
