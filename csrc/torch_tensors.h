// PyTorch's tensors seen from C, through functions that Python hands over by address when the library is loaded: those of
// PyTorch's stable C interface (aoti_torch_*) and of Python's. No header of either is needed, and where one of the
// functions is missing the rest of the library works all the same.
#pragma once
#include <cstdint>

// HOST_FUNCTION(result, name, arguments): onepass/core/cpu_library.py lists them in the same order.
// PyTorch's return 0 on success; a tensor is a handle of theirs (at::Tensor*), an object is Python's (PyObject*).
#define HOST_FUNCTIONS                                                                                                \
  HOST_FUNCTION(int32_t, get_data_ptr, void* tensor, void** data)                                                     \
  HOST_FUNCTION(int32_t, get_dim, void* tensor, int64_t* dim)                                                         \
  HOST_FUNCTION(int32_t, get_sizes, void* tensor, int64_t** sizes)                                                    \
  HOST_FUNCTION(int32_t, get_strides, void* tensor, int64_t** strides)                                                \
  HOST_FUNCTION(int32_t, get_dtype, void* tensor, int32_t* dtype)                                                     \
  HOST_FUNCTION(int32_t, get_device_type, void* tensor, int32_t* device_type)                                         \
  HOST_FUNCTION(int32_t, get_device_index, void* tensor, int32_t* device_index)                                       \
  HOST_FUNCTION(int32_t, get_layout, void* tensor, int32_t* layout)                                                   \
  HOST_FUNCTION(int32_t, empty_strided, int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,     \
                 int32_t device_type, int32_t device_index, void** tensor)                                            \
  HOST_FUNCTION(int32_t, delete_tensor_object, void* tensor)                                                          \
  HOST_FUNCTION(void*, capsule_get_pointer, void* object, const char* name)                                           \
  HOST_FUNCTION(void*, capsule_new, void* pointer, const char* name, void (*destructor)(void*))                       \
  HOST_FUNCTION(void, incref, void* object)                                                                           \
  HOST_FUNCTION(void*, release_gil)                                                                                   \
  HOST_FUNCTION(void, take_gil, void* thread_state)

struct HostFunctions {
#define HOST_FUNCTION(RESULT, NAME, ...) RESULT (*NAME)(__VA_ARGS__);
  HOST_FUNCTIONS
#undef HOST_FUNCTION
};

// PyTorch's own numbers (c10::ScalarType, c10::DeviceType, c10::Layout).
constexpr int32_t TORCH_INT32 = 3, TORCH_FLOAT16 = 5, TORCH_FLOAT32 = 6, TORCH_BFLOAT16 = 15;
constexpr int32_t TORCH_CPU = 0, TORCH_STRIDED = 0;
