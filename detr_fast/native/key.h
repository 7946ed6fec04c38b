// What tells calls apart: all that a decision or a program depends on, as words, and tables by it.
#pragma once

#include "objects.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/PyInterpreter.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <unordered_map>

namespace host {

// Who looks, and the state that is read besides a call's arguments.

struct Settings {
  Object observers, recorders;  // the lists of those who are told of launches and of decisions
  Object launch, empty;         // `kernels.launch`'s names, and the `_allocate` that is not a test's
  Object hooks;                 // Triton's: `knobs.runtime`, or none
  Object capturing;             // a function: whether a CUDA graph is captured
  Object default_device;        // the class of the mode that `torch.set_default_device` enters
};

Settings* settings = nullptr;
int64_t requests = 0;    // a number for what `use_backend` asks for
int64_t generation = 0;  // another one when programs are forgotten

// A mode that sees functions; a default device alone is none: programs name theirs.
bool followed_by_function_mode() {
  using at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) return false;
  if (PythonTorchFunctionTLS::stack_len() != 1) return true;
  PyObject* mode = PythonTorchFunctionTLS::get_stack_at(0)->ptr(getPyInterpreter());
  return reinterpret_cast<PyObject*>(Py_TYPE(mode)) != settings->default_device.get();
}

// A compiler, a mode, a transform, a tracer or forward-mode differentiation that follows each op.
bool followed() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || followed_by_function_mode() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::jit::tracer::isTracing() || torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// A name, as attributes and modules are asked by.
PyObject* interned(const char* name) {
  PyObject* found = PyUnicode_InternFromString(name);
  if (found == nullptr) throw python_error();
  return found;
}

bool hooked(PyObject* name) {
  static PyObject* const calls_name = interned("calls");
  const Object hook = Object::stolen(PyObject_GetAttr(settings->hooks.get(), name));
  if (hook.get() == Py_None) return false;
  Object calls = hook;
  if (PyObject* found = PyObject_GetAttr(hook.get(), calls_name)) {
    calls = Object::stolen(found);
  } else {
    PyErr_Clear();
  }
  const int truth = PyObject_IsTrue(calls.get());
  if (truth < 0) throw python_error();
  return truth > 0;
}

// Whether backwards are compiled here, by what can't trace a node of C++.
bool compiled_autograd() {
  static PyObject *const module_name = interned("torch._dynamo.compiled_autograd"),
                         *const flag = interned("compiled_autograd_enabled");
  PyObject* module = PyDict_GetItem(PyImport_GetModuleDict(), module_name);
  if (module == nullptr || !PyModule_Check(module)) return false;
  PyObject* enabled = PyDict_GetItem(PyModule_GetDict(module), flag);
  return enabled != nullptr && PyObject_IsTrue(enabled) > 0;
}

// Or somebody who is to see ops, launches or what is saved for backward, or allocates for kernels.
bool seen() {
  static PyObject *const allocate = interned("_allocate"), *const enter = interned("launch_enter_hook"),
                         *const leave = interned("launch_exit_hook");
  return followed() || at::hasCallbacks() || torch::autograd::AnomalyMode::is_enabled() ||
      at::SavedTensorDefaultHooks::get_hooks().has_value() || PyList_GET_SIZE(settings->observers.get()) > 0 ||
      PyList_GET_SIZE(settings->recorders.get()) > 0 ||
      PyDict_GetItem(settings->launch.get(), allocate) != settings->empty.get() || compiled_autograd() ||
      (settings->hooks && (hooked(enter) || hooked(leave)));
}

int64_t asked(const Object& function) {
  return integer(Object::stolen(PyObject_CallNoArgs(function.get())).get());
}

c10::DispatchKeySet inference_keys(c10::DispatchKey backend, c10::DispatchKey autocast) {
  return c10::DispatchKeySet(backend).add(autocast);
}

c10::DispatchKeySet recorded_keys(c10::DispatchKeySet inference, c10::DispatchKey autograd) {
  return inference.add(c10::DispatchKey::ADInplaceOrView).add(autograd);
}

// Whether a tensor is nothing but memory on a CPU or a GPU: not negated, conjugated, batched, fake, ...
bool is_memory(const Tensor& tensor) {
  using c10::DispatchKey;
  static const auto on_cpu = inference_keys(DispatchKey::CPU, DispatchKey::AutocastCPU);
  static const auto on_gpu = inference_keys(DispatchKey::CUDA, DispatchKey::AutocastCUDA);
  static const uint64_t plain[] = {
      on_gpu.raw_repr(),
      recorded_keys(on_gpu, DispatchKey::AutogradCUDA).raw_repr(),
      on_cpu.raw_repr(),
      recorded_keys(on_cpu, DispatchKey::AutogradCPU).raw_repr()};
  const auto keys = tensor.key_set().raw_repr();
  return std::find(std::begin(plain), std::end(plain), keys) != std::end(plain);
}

constexpr int64_t kAlignment = 16;  // bytes: what kernels move at once

struct Span {
  const void* storage;
  uintptr_t start, end;
};

Span span_of(const Tensor& tensor) {
  const auto start = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {nullptr, start, start};
  uintptr_t elements = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements += (tensor.size(i) - 1) * tensor.stride(i);
  return {tensor.storage().unsafeGetStorageImpl(), start, start + elements * tensor.itemsize()};
}

using Words = std::vector<int64_t>;

// All that a decision or a program depends on, as words: of each tensor its shape, layout, dtype, device, alignment and
// whether it wants a gradient, how those overlap that do, other arguments' values, and PyTorch's and our own state.
class Key {
 public:
  // skipped: the index of an argument that may be any integer, or -1. False where a call has no key.
  bool read(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t skipped) {
    words_.assign(1, 0);
    spans_.clear();
    device_.reset();
    exact_ = false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (i == skipped && PyLong_CheckExact(arguments[i])) {
        words_.push_back(kSkipped);
      } else if (!add(arguments[i])) {
        return false;
      }
    }
    if (!device_) return false;
    add_overlaps();
    const auto kind = device_->type();
    const int64_t autocast =
        at::autocast::is_autocast_enabled(kind) ? static_cast<int64_t>(at::autocast::get_autocast_dtype(kind)) : 0xff;
    words_[0] = at::GradMode::is_enabled() | c10::InferenceMode::is_enabled() << 1 |
        at::globalContext().deterministicAlgorithms() << 2 | autocast << 8 | requests << 24;
    if (kind == at::kCUDA) words_[0] |= asked(settings->capturing) << 4;
    if (exact_) {
      const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
      words_[0] |= static_cast<int64_t>(precision) << 16;
    }
    return true;
  }

  const Words& words() const { return words_; }
  c10::Device device() const { return *device_; }
  bool captured() const { return words_[0] & 1 << 4; }

 private:
  enum : int64_t { kSkipped = 1, kNone, kFalse, kTrue, kInteger, kFloat, kText, kDtype, kTuple, kList, kTensor, kOverlap };

  bool add(PyObject* one) {
    if (one == Py_None) {
      words_.push_back(kNone);
    } else if (THPVariable_CheckExact(one)) {
      return add(THPVariable_Unpack(one));
    } else if (PyBool_Check(one)) {
      words_.push_back(one == Py_True ? kTrue : kFalse);
    } else if (PyLong_CheckExact(one)) {
      int overflow = 0;
      const auto value = PyLong_AsLongLongAndOverflow(one, &overflow);
      if (overflow) return false;
      words_.insert(words_.end(), {kInteger, value});
    } else if (PyFloat_CheckExact(one)) {
      const double value = PyFloat_AS_DOUBLE(one);
      int64_t bits = 0;
      std::memcpy(&bits, &value, sizeof bits);
      words_.insert(words_.end(), {kFloat, bits});
    } else if (PyUnicode_CheckExact(one)) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(one, &size);
      if (text == nullptr) throw python_error();
      words_.insert(words_.end(), {kText, size});
      for (Py_ssize_t i = 0; i < size; i += 8) {
        int64_t word = 0;
        std::memcpy(&word, text + i, std::min<Py_ssize_t>(8, size - i));
        words_.push_back(word);
      }
    } else if (THPDtype_Check(one)) {
      words_.insert(words_.end(), {kDtype, static_cast<int64_t>(reinterpret_cast<THPDtype*>(one)->scalar_type)});
    } else if (PyTuple_Check(one) || PyList_CheckExact(one)) {
      const auto count = PySequence_Fast_GET_SIZE(one);
      words_.insert(words_.end(), {PyTuple_Check(one) ? kTuple : kList, count});
      for (Py_ssize_t i = 0; i < count; ++i) {
        if (!add(PySequence_Fast_GET_ITEM(one, i))) return false;
      }
    } else {
      return false;
    }
    return true;
  }

  bool add(const Tensor& tensor) {
    if (!is_memory(tensor) || tensor._fw_grad(0).defined()) return false;
    const auto device = tensor.device();
    if (!device_) device_ = device;
    exact_ |= tensor.scalar_type() == at::kFloat;
    const auto span = span_of(tensor);
    words_.push_back(
        kTensor | static_cast<int64_t>(tensor.scalar_type()) << 8 | static_cast<int64_t>(device.type()) << 16 |
        (static_cast<int64_t>(device.index()) & 0xff) << 24 | static_cast<int64_t>(tensor.requires_grad()) << 32 |
        static_cast<int64_t>(span.start % kAlignment) << 33 | static_cast<int64_t>(tensor.is_inference()) << 37 |
        tensor.dim() << 40);
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    words_.insert(words_.end(), sizes.begin(), sizes.end());
    words_.insert(words_.end(), strides.begin(), strides.end());
    spans_.push_back(span);
    return true;
  }

  // Where two tensors overlap, how far apart they are: a program knows memory by the first of them.
  void add_overlaps() {
    for (size_t j = 1; j < spans_.size(); ++j) {
      for (size_t i = 0; i < j; ++i) {
        const auto &one = spans_[i], &other = spans_[j];
        if (one.storage == other.storage && one.start < other.end && other.start < one.end) {
          words_.insert(words_.end(), {kOverlap, static_cast<int64_t>(i << 32 | j), static_cast<int64_t>(other.start - one.start)});
        }
      }
    }
  }

  Words words_;
  std::vector<Span> spans_;
  std::optional<c10::Device> device_;
  bool exact_ = false;
};

struct Hash {
  size_t operator()(const Words& words) const {
    uint64_t hash = words.size();
    for (const auto word : words) {
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15ull;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

using Table = std::unordered_map<Words, Object, Hash>;

// Drop everything where programs were forgotten. What a table holds may run Python when it goes, so that it goes last.
void tidy(Table& table, int64_t& of) {
  if (of == generation) return;
  Table dropped;
  dropped.swap(table);
  of = generation;
}

// Shapes that vary for ever must not fill the memory.
void keep(Table& table, size_t limit, const Words& words, Object value) {
  Table dropped;
  if (table.size() >= limit) dropped.swap(table);
  table.insert_or_assign(words, std::move(value));
}

}  // namespace host
