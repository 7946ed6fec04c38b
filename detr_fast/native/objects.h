// Python objects that are owned, and what tuples hold. To copy or destroy an Object takes the GIL.
#pragma once

#include <Python.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <utility>
#include <vector>

namespace host {

using at::Tensor;

class Object {
 public:
  Object() = default;
  static Object stolen(PyObject* object) {
    if (object == nullptr) throw python_error();
    Object one;
    one.object_ = object;
    return one;
  }
  static Object borrowed(PyObject* object) {
    Py_XINCREF(object);
    Object one;
    one.object_ = object;
    return one;
  }
  Object(const Object& other) : object_(other.object_) { Py_XINCREF(object_); }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// The GIL, given away: for what may wait, as an allocation or a launch for a device that waits for another thread's.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;

 private:
  PyThreadState* state_;
};

PyObject* item(PyObject* tuple, Py_ssize_t index) {
  if (!PyTuple_Check(tuple) || index >= PyTuple_GET_SIZE(tuple)) {
    PyErr_SetString(PyExc_TypeError, "a tuple of an instruction, section or program is not as ops.host_native makes them");
    throw python_error();
  }
  return PyTuple_GET_ITEM(tuple, index);
}

int64_t integer(PyObject* object) {
  const auto found = PyLong_AsLongLong(object);
  if (found == -1 && PyErr_Occurred()) throw python_error();
  return found;
}

std::vector<int64_t> integers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < Py_SIZE(tuple); ++i) found.push_back(integer(item(tuple, i)));
  return found;
}

Tensor tensor_or_none(PyObject* object) {
  if (object == Py_None) return {};
  if (!THPVariable_Check(object)) {
    PyErr_Format(PyExc_TypeError, "got %s; expected a tensor or None", Py_TYPE(object)->tp_name);
    throw python_error();
  }
  return THPVariable_Unpack(object);
}

Object wrapped(const Tensor& tensor) {
  return tensor.defined() ? Object::stolen(THPVariable_Wrap(tensor)) : Object::borrowed(Py_None);
}

Object tuple_of(const std::vector<Tensor>& tensors) {
  Object tuple = Object::stolen(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  for (size_t i = 0; i < tensors.size(); ++i) PyTuple_SET_ITEM(tuple.get(), i, wrapped(tensors[i]).release());
  return tuple;
}

// A Python object that holds one of ours, and may be called.
template <class T>
struct Holder {
  PyObject_HEAD
  T* held;
  vectorcallfunc vectorcall;
};

template <class T>
T& held(PyObject* self) {
  return *reinterpret_cast<Holder<T>*>(self)->held;
}

template <class T>
PyObject* new_holder(PyTypeObject* type, std::unique_ptr<T> held, vectorcallfunc vectorcall = nullptr) {
  Object made = Object::stolen(type->tp_alloc(type, 0));
  auto& holder = *reinterpret_cast<Holder<T>*>(made.get());
  holder.held = held.release();
  holder.vectorcall = vectorcall;
  return made.release();
}

template <class T>
void free_holder(PyObject* self) {
  delete reinterpret_cast<Holder<T>*>(self)->held;
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

}  // namespace host
