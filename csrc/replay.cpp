// A plain call that has been seen before, done again here: its checks, allocations and launches cost 15 to 40 us of host
// time in Python, and 5 here.
//
// onepass/core/replay.py watches a call of an operation once, and writes down what it allocated and which kernels it
// launched with which arguments: a plan. All of it depends only on what the arguments look like (dtypes, sizes, strides,
// alignment, the values of numbers and strings), which is the key under which the plan is kept. A call with a known key is
// replayed: outputs allocated, the launches repeated with the new addresses in the old places. Whatever else could make a
// difference (autograd, autocast, modes, subclasses, another device) declines, and the call goes the ordinary way.
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "torch_tensors.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A PyObject's head, the same in every CPython with a GIL.
struct Object {
  intptr_t references;
  Object* type;
};

// CUlaunchAttribute and CUlaunchConfig of CUDA's driver, which need not be installed here.
struct alignas(8) CudaLaunchAttribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};
struct CudaLaunch {
  unsigned grid[3], block[3], shared;
  void* stream;
  const CudaLaunchAttribute* attributes;
  unsigned attribute_count;
};
constexpr int MAY_FOLLOW = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
static_assert(sizeof(CudaLaunchAttribute) == 72 && sizeof(CudaLaunch) == 56);

// What replay.py hands over, in this order.
struct Python {
  HostFunctions torch;
  Object* (*call_no_args)(Object*);
  Object* (*call_one_arg)(Object*, Object*);
  Object* (*get_attribute)(Object*, Object*);
  Object* (*new_list)(intptr_t);
  int (*list_set)(Object*, intptr_t, Object*);  // takes the item over
  Object* (*list_get)(Object*, intptr_t);       // lends it
  Object* (*new_tuple)(intptr_t);
  int (*tuple_set)(Object*, intptr_t, Object*);
  int64_t (*as_int)(Object*);
  Object* (*from_int)(int64_t);
  double (*as_double)(Object*);
  const char* (*as_utf8)(Object*, intptr_t*);
  Object* (*error)();
  void (*clear_error)();
  void (*decref)(Object*);
  int (*launch_cuda)(const CudaLaunch*, void* function, void** parameters, void** extra);  // cuLaunchKernelEx
  // Objects, borrowed for good.
  Object *none, *yes, *no, *zero, *minus_one;
  Object *tensor, *parameter, *integer, *real, *string;  // types
  Object *quiet[8];                                      // functions that give None, False or 0 when all is plain
  Object *forward_ad, *current_level;                    // a module and the name of its attribute, -1 when unused
  Object *grad_enabled, *requires_grad, *is_negative;    // a function, an attribute's name, a method of tensors
  Object *num_threads, *cuda_device, *cuda_stream;       // functions; the last one takes the device's index
  Object* allows_tf32;                                   // a function; kernels are chosen by it
  Object *to_handles, *to_tensors;                       // PyTorch's: a list of tensors to handles, and back
  // The same sooner, where replay.py has found that it works: where a tensor's object holds what a handle points to
  // (0: unknown), and the function that makes an object for a handle (null: unknown).
  int64_t handle_offset;
  Object* (*wrap)(void* tensor);
};

Python py;

constexpr int64_t MOST_TENSORS = 16, MOST_PLANS = 4096, MOST_PARAMETERS = 96;
constexpr int32_t TORCH_CUDA = 1;

// Deleted when it goes out of scope.
struct Owned {
  Object* object;
  explicit Owned(Object* o) : object(o) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (object) py.decref(object);
  }
};

struct Handle {
  void* tensor = nullptr;
  Handle() = default;
  Handle(const Handle&) = delete;
  ~Handle() {
    if (tensor) py.torch.delete_tensor_object(tensor);
  }
};

struct Allocation {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
};

// The words of a launch's arguments; those at `places` are addresses of the tensors `sources`.
struct Launch {
  void* function;
  bool on_cpu;
  unsigned grid[3], threads, shared;
  bool follows;
  std::vector<int64_t> words;
  std::vector<std::pair<int64_t, int64_t>> places;
};

struct Plan {
  int32_t device_type;
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<int64_t> results;  // of the allocations
  bool single;                   // one tensor, not a tuple
};

struct Entry {
  int64_t serial;
  bool declined = false;
  std::shared_ptr<Plan> plan;
};

struct Calls {
  std::unordered_map<std::string, Entry> entries;
  int64_t serials = 0;
};

bool is_quiet() {
  for (Object* function : py.quiet) {
    if (!function) break;
    const Owned result(py.call_no_args(function));
    if (result.object != py.no && result.object != py.none && result.object != py.zero) return false;
  }
  const Owned level(py.get_attribute(py.forward_ad, py.current_level));
  return level.object == py.minus_one;
}

bool is_tensor(const Object* object) { return object->type == py.tensor || object->type == py.parameter; }

// A tensor whose dispatch would come to its kernel at once.
bool is_plain(Object* tensor, bool grad) {
  if (grad) {
    const Owned required(py.get_attribute(tensor, py.requires_grad));
    if (required.object != py.no) return false;
  }
  const Owned negative(py.call_one_arg(py.is_negative, tensor));
  return negative.object == py.no;
}

// Tensors as handles, while this lives.
class Inputs {
 public:
  Inputs() = default;
  Inputs(const Inputs&) = delete;
  ~Inputs() {
    for (int64_t i = 0; i < owned_; i++) py.torch.delete_tensor_object(handles_[i]);
  }
  void* operator[](int64_t i) const { return handles_[i]; }

  bool take(Object* const* tensors, int64_t count) {
    if (py.handle_offset) {
      for (int64_t i = 0; i < count; i++) {
        char* object = reinterpret_cast<char*>(tensors[i]);
        // A word between the head and the tensor says whether the tensor is held elsewhere.
        if (py.handle_offset > int64_t(sizeof(Object)) && object[sizeof(Object)]) return false;
        handles_[i] = object + py.handle_offset;
      }
      return true;
    }
    const Owned list(py.new_list(count));
    for (int64_t i = 0; i < count; i++) {
      py.torch.incref(tensors[i]);
      py.list_set(list.object, i, tensors[i]);
    }
    const Owned capsules(py.call_one_arg(py.to_handles, list.object));
    if (!capsules.object) return false;
    for (; owned_ < count; owned_++)
      handles_[owned_] = py.torch.capsule_get_pointer(py.list_get(capsules.object, owned_), nullptr);
    return true;
  }

 private:
  void* handles_[MOST_TENSORS / 2];
  int64_t owned_ = 0;
};

// Objects for new tensors, which are taken over, as one or as a tuple; null: failed.
Object* as_result(Handle* made, const std::vector<int64_t>& results, bool single) {
  const int64_t count = results.size();
  Object* objects[MOST_TENSORS];
  if (py.wrap) {
    for (int64_t i = 0; i < count; i++) objects[i] = py.wrap(made[results[i]].tensor);
  } else {
    const Owned handles(py.new_list(count));
    for (int64_t i = 0; i < count; i++) {
      void*& tensor = made[results[i]].tensor;
      py.list_set(handles.object, i, static_cast<Object*>(py.torch.capsule_new(tensor, nullptr, nullptr)));
      tensor = nullptr;  // the list's now
    }
    const Owned tensors(py.call_one_arg(py.to_tensors, handles.object));
    if (!tensors.object) return nullptr;
    for (int64_t i = 0; i < count; i++) py.torch.incref(objects[i] = py.list_get(tensors.object, i));
  }
  if (single) return objects[0];
  Object* tuple = py.new_tuple(count);
  for (int64_t i = 0; i < count; i++) py.tuple_set(tuple, i, objects[i]);
  return tuple;
}

class Key {
 public:
  void add(int64_t word) { text_.append(reinterpret_cast<const char*>(&word), sizeof word); }
  void add(const char* bytes, int64_t count) {
    add(count);
    text_.append(bytes, count);
  }
  void clear() { text_.clear(); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// Numbers, strings and None into the key; false for anything else.
bool add_option(Key& key, Object* object) {
  if (object == py.none || object == py.yes || object == py.no) {
    key.add(object == py.none ? 'n' : object == py.yes ? 't' : 'f');
  } else if (object->type == py.integer) {
    key.add('i'), key.add(py.as_int(object));
  } else if (object->type == py.real) {
    const double value = py.as_double(object);
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    key.add('d'), key.add(bits);
  } else if (object->type == py.string) {
    intptr_t count;
    const char* bytes = py.as_utf8(object, &count);
    if (!bytes) return false;
    key.add('s'), key.add(bytes, count);
  } else {
    return false;
  }
  return !py.error();
}

// A dense tensor with memory (if it has elements) on `device_type` (-1: not known yet).
bool add_tensor(Key& key, void* tensor, int32_t& device_type, void*& data) {
  int32_t device, layout, dtype;
  int64_t dim, *sizes, *strides;
  if (py.torch.get_device_type(tensor, &device) || py.torch.get_layout(tensor, &layout) || layout != TORCH_STRIDED ||
      (device != TORCH_CPU && device != TORCH_CUDA) || (device_type >= 0 && device != device_type) ||
      py.torch.get_dtype(tensor, &dtype) || py.torch.get_dim(tensor, &dim) || py.torch.get_sizes(tensor, &sizes) ||
      py.torch.get_strides(tensor, &strides) || py.torch.get_data_ptr(tensor, &data))
    return false;
  device_type = device;
  key.add('T'), key.add(device), key.add(dtype), key.add(dim);
  bool empty = false;
  for (int64_t i = 0; i < dim; i++) key.add(sizes[i]), key.add(strides[i]), empty = empty || sizes[i] == 0;
  if (!data && !empty) return false;  // a stand-in of some kind
  key.add(reinterpret_cast<intptr_t>(data) & 15);
  return true;
}

// The device that must be current, as its index: 0 for the CPU.
int64_t current_index(int32_t device_type) {
  if (device_type == TORCH_CPU) return 0;
  const Owned index(py.call_no_args(py.cuda_device));
  return index.object ? py.as_int(index.object) : -1;
}

bool launch(const Launch& call, void* const* data, void* stream) {
  int64_t words[MOST_PARAMETERS];
  memcpy(words, call.words.data(), call.words.size() * sizeof(int64_t));
  for (const auto& [place, source] : call.places) words[place] = reinterpret_cast<intptr_t>(data[source]);
  if (call.on_cpu) return reinterpret_cast<int (*)(const void*)>(call.function)(words) == 0;
  void* parameters[MOST_PARAMETERS];
  for (size_t i = 0; i < call.words.size(); i++) parameters[i] = &words[i];
  const CudaLaunchAttribute may_follow = {MAY_FOLLOW, {}, 1, {}};
  const CudaLaunch config = {{call.grid[0], call.grid[1], call.grid[2]}, {call.threads, 1, 1}, call.shared, stream,
                             &may_follow, call.follows ? 1u : 0u};
  return py.launch_cuda(&config, call.function, parameters, nullptr) == 0;
}

// The results of a plan, new references; null: it could not be done.
Object* perform(const std::shared_ptr<Plan>& plan, int64_t device_index, void** data, int64_t inputs) {
  const Plan& p = *plan;
  Handle made[MOST_TENSORS];
  for (size_t i = 0; i < p.allocations.size(); i++) {
    const Allocation& a = p.allocations[i];
    if (py.torch.empty_strided(a.sizes.size(), a.sizes.data(), a.strides.data(), a.dtype, p.device_type,
                               device_index, &made[i].tensor) ||
        py.torch.get_data_ptr(made[i].tensor, &data[inputs + i]))
      return nullptr;
  }
  void* stream = nullptr;
  if (p.device_type == TORCH_CUDA) {
    const Owned index(py.from_int(device_index));
    const Owned number(py.call_one_arg(py.cuda_stream, index.object));
    if (!number.object) return nullptr;
    stream = reinterpret_cast<void*>(py.as_int(number.object));
  }
  void* thread_state = p.device_type == TORCH_CPU ? py.torch.release_gil() : nullptr;
  bool done = true;
  for (const Launch& call : p.launches) done = done && launch(call, data, stream);
  if (thread_state) py.torch.take_gil(thread_state);
  if (!done) return nullptr;
  return as_result(made, p.results, p.single);
}

// What replay_call does, new reference; null: declined.
Object* replay(Calls& calls, Object* const* arguments, intptr_t count) {
  if (!is_quiet()) return nullptr;
  const Owned grad_object(py.call_no_args(py.grad_enabled));
  const bool grad = grad_object.object != py.no;
  thread_local Key key;
  key.clear();
  Object* tensors[MOST_TENSORS];
  int64_t inputs = 0;
  for (intptr_t i = 0; i < count; i++) {
    if (is_tensor(arguments[i])) {
      if (inputs == MOST_TENSORS / 2 || !is_plain(arguments[i], grad)) return nullptr;
      tensors[inputs++] = arguments[i];
      key.add('@');
    } else if (!add_option(key, arguments[i])) {
      return nullptr;
    }
  }
  if (!inputs) return nullptr;
  Inputs handles;
  if (!handles.take(tensors, inputs)) return nullptr;
  void* data[MOST_TENSORS * 2];
  int32_t device_type = -1, device_index = 0;
  for (int64_t i = 0; i < inputs; i++) {
    int32_t index;
    if (!add_tensor(key, handles[i], device_type, data[i]) ||
        py.torch.get_device_index(handles[i], &index) || (i && index != device_index))
      return nullptr;
    device_index = index;
    for (int64_t j = 0; j < i; j++)
      if (data[j] == data[i]) key.add('='), key.add(j);  // a plan could not tell them apart
  }
  const Owned tf32(py.call_no_args(py.allows_tf32));
  key.add(tf32.object == py.yes);
  if (device_type == TORCH_CPU) {
    const Owned threads(py.call_no_args(py.num_threads));
    key.add(py.as_int(threads.object));
  } else if (current_index(device_type) != device_index) {
    return nullptr;
  } else {
    key.add(device_index);
  }
  const auto found = calls.entries.find(key.text());
  if (found == calls.entries.end()) {
    if (calls.entries.size() >= MOST_PLANS) calls.entries.clear();
    calls.entries[key.text()].serial = calls.serials++;
    return nullptr;
  }
  if (found->second.declined) return nullptr;
  const std::shared_ptr<Plan> plan = found->second.plan;
  if (!plan) return py.from_int(found->second.serial);
  return perform(plan, device_type == TORCH_CPU ? 0 : device_index, data, inputs);
}

// A plan as replay.py packs it: words, each vector led by its length.
class Reader {
 public:
  Reader(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}
  int64_t next() { return at_ < end_ ? *at_++ : 0; }
  std::vector<int64_t> vector() {
    std::vector<int64_t> values(next());
    for (int64_t& value : values) value = next();
    return values;
  }

 private:
  const int64_t *at_, *end_;
};

std::shared_ptr<Plan> read_plan(Reader in) {
  auto plan = std::make_shared<Plan>();
  plan->device_type = in.next();
  plan->single = in.next();
  plan->results = in.vector();
  plan->allocations.resize(in.next());
  for (Allocation& a : plan->allocations) a.dtype = in.next(), a.sizes = in.vector(), a.strides = in.vector();
  plan->launches.resize(in.next());
  for (Launch& call : plan->launches) {
    call.function = reinterpret_cast<void*>(in.next());
    call.on_cpu = in.next();
    for (unsigned& blocks : call.grid) blocks = in.next();
    call.threads = in.next(), call.shared = in.next(), call.follows = in.next();
    call.words = in.vector();
    const std::vector<int64_t> places = in.vector();
    for (size_t i = 0; i + 1 < places.size(); i += 2) call.places.emplace_back(places[i], places[i + 1]);
    if (call.words.size() > MOST_PARAMETERS) return nullptr;
  }
  return plan->allocations.size() > MOST_TENSORS || plan->launches.empty() ? nullptr : plan;
}

}  // namespace

EXPORT int64_t onepass_replay_bind(const void* python, int64_t size) {
  if (size != sizeof py) return sizeof py;
  memcpy(&py, python, sizeof py);
  return 0;
}

// The known calls of one operation.
EXPORT void* onepass_replay_new() { return new (std::nothrow) Calls; }
EXPORT void onepass_replay_forget(void* calls) { static_cast<Calls*>(calls)->entries.clear(); }

// A Python function of C's (METH_FASTCALL), bound to a capsule with the operation's Calls. Its results: those of the
// call; an int, the serial number of a call that came for the second time and should be watched; None, declined.
EXPORT void* onepass_replay_call(void* self, void* const* arguments, intptr_t count) {
  Calls* calls = static_cast<Calls*>(py.torch.capsule_get_pointer(self, nullptr));
  Object* result = replay(*calls, reinterpret_cast<Object* const*>(arguments), count);
  if (result) return result;
  if (py.error()) py.clear_error();  // the ordinary way finds it again, and has words for it
  py.torch.incref(py.none);
  return py.none;
}

// The plan of the call with that serial number; without words: there is none, do not ask again.
EXPORT void onepass_replay_add(void* calls, int64_t serial, const int64_t* words, int64_t count) {
  for (auto& [key, entry] : static_cast<Calls*>(calls)->entries) {
    if (entry.serial != serial) continue;
    entry.plan = count ? read_plan(Reader(words, count)) : nullptr;
    entry.declined = !entry.plan;
    return;
  }
}
